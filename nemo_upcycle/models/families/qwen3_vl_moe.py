"""Qwen3-VL-MoE: the text model is a Qwen3-MoE. Published files hold its experts in one tensor, transposed."""

from __future__ import annotations

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import llama, qwen3_moe


_EXPERTS = llama.LAYER + "mlp.experts."


class _Qwen3VlMoe(qwen3_moe.Qwen3Moe):
    def limits(self, arch: Architecture) -> dict[str, bool]:
        # transformers 5 saves experts untransposed, and tells the two forms apart by shape (transformers issue 47031).
        # A square matrix has the same shape in both forms.
        is_square = arch.hidden_size in (arch.expert_ffn_size, 2 * (arch.expert_ffn_size or 0))
        return super().limits(arch) | {
            "expert weights that do not sum to one": not arch.norm_topk,
            "experts as wide as the hidden size, or half as wide": is_square,
        }


FAMILY = _Qwen3VlMoe(
    title="Qwen3-VL-MoE",
    hf_class="Qwen3VLMoeForConditionalGeneration",
    model_type="qwen3_vl_moe_text",
    names={
        **qwen3_moe.FAMILY.names,
        "expert_fc1": (_EXPERTS + "gate_up_proj[{expert}].T",) * 2,
        "expert_fc2": (_EXPERTS + "down_proj[{expert}].T",),
    },
    spelling=qwen3_moe.FAMILY.spelling,
    has_attention_bias=True,
    defaults={**qwen3_moe.FAMILY.defaults, "norm_topk_prob": True},
    computed_as=qwen3_moe.FAMILY.hf_class,
    only_among_others=True,
    no_parent_because="whose experts lie in one tensor",
)
