"""Dense classes without a family, each with the reason."""

from __future__ import annotations


#: Class in `architectures` -> reason why the class has no family.
REFUSED = {
    "NemotronForCausalLM": "its norms are LayerNorms with biases, which no family has",
    "Qwen2AudioForConditionalGeneration": "it is not in WRAPPERS of nemo_upcycle.models.wrapper",
    "Molmo2ForConditionalGeneration": "its embedding lies in two tensors, and the output layer has rows for only one",
    "MuseGlimmerForConditionalGeneration": (
        "its embedding is normalised and its logits are limited by tanh, in contrast to every MoE class of"
        " transformers and every model of Megatron-Bridge"
    ),
}
#: Classes that release 0.2 read with Megatron-Bridge's own mapping.
READ_BY_0_2 = ("NemotronForCausalLM", "Qwen2AudioForConditionalGeneration")
#: Advice for a run that release 0.2 filled with Megatron-Bridge's own mapping.
FINISH_WITH_0_2 = "Release 0.2.0 can finish a run that it started with this class"
