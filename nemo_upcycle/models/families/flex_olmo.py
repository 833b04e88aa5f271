"""FlexOlmo: OLMo 2's attention and norms, routed experts in every layer, combine weights that need not sum to one."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import olmo2
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ConfigValues, MoeFamily
from nemo_upcycle.models.families.routed import ROUTED_NAMES, experts_everywhere


class FlexOlmo(MoeFamily):
    """OLMo classes with experts in every layer, and norms of query and key over all heads."""

    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """Return the `Architecture` fields that describe the experts."""
        return experts_everywhere(config, "num_experts") | {"norm_topk": config.flag("norm_topk_prob")}

    def limits(self, arch: Architecture) -> dict[str, bool]:
        """See `MoeFamily.limits`."""
        return super().limits(arch) | {
            "biases of query, key and value alone": arch.qkv_bias and not arch.attention_out_bias,
            "dense layers": arch.moe_pattern is not None,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        """See `MoeFamily.expert_settings`."""
        return {
            "num_experts": arch.num_experts,
            "intermediate_size": arch.expert_ffn_size,
            "norm_topk_prob": arch.norm_topk,
            **({"attention_bias": True} if arch.attention_out_bias else {}),
        }


FAMILY = FlexOlmo(
    title="FlexOlmo",
    hf_class="FlexOlmoForCausalLM",
    model_type="flex_olmo",
    names=olmo2.NAMES | ROUTED_NAMES,
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 4096, "rope_theta": 5e5, "qk_norm": True},
    pre_norm=False,
    post_norm=True,
    wide_qk_norm=True,
    has_attention_bias=True,
)
