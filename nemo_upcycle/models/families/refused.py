"""Dense classes that have no family, each with the reason. Release 0.2 read them by Megatron-Bridge's own mapping."""

from __future__ import annotations


#: Class in `architectures` -> the reason.
REFUSED = {
    "NemotronForCausalLM": "its norms are LayerNorms with biases, which no family has",
    "Qwen2AudioForConditionalGeneration": "it is not in WRAPPERS of nemo_upcycle.models.wrapper",
}
#: What a user can do with a run that 0.2 filled by Megatron-Bridge's own mapping.
FINISH_WITH_0_2 = "Release 0.2.0 can finish a run that it started so"
