"""Dense classes without a family, each with the reason. Release 0.2 read them with Megatron-Bridge's own mapping."""

from __future__ import annotations


#: Class in `architectures` -> reason why the class has no family.
REFUSED = {
    "NemotronForCausalLM": "its norms are LayerNorms with biases, which no family has",
    "Qwen2AudioForConditionalGeneration": "it is not in WRAPPERS of nemo_upcycle.models.wrapper",
}
#: Advice for a run that release 0.2 filled with Megatron-Bridge's own mapping.
FINISH_WITH_0_2 = "Release 0.2.0 can finish a run that it started with this class"
