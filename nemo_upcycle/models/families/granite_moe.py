"""GraniteMoe: Granite's multipliers, experts in every layer (as one tensor), combine weights that sum to one."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import ConfigValues, MoeFamily
from nemo_upcycle.models.families.granite import DEFAULTS
from nemo_upcycle.models.families.routed import experts_everywhere


_MOE = llama.LAYER + "block_sparse_moe."
NAMES = llama.NAMES | {
    "router": (_MOE + "router.layer.weight",),
    "expert_fc1": (_MOE + "input_linear.weight[{expert}]",) * 2,
    "expert_fc2": (_MOE + "output_linear.weight[{expert}]",),
}


class GraniteMoe(MoeFamily):
    """Base of Granite's MoE classes."""

    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """Return the `Architecture` fields that describe the experts."""
        return experts_everywhere(config, "num_local_experts")

    def limits(self, arch: Architecture) -> dict[str, bool]:
        """See `MoeFamily.limits`."""
        return super().limits(arch) | {
            "no multipliers": arch.attention_multiplier is None,
            "heads that do not make up the hidden size": arch.num_heads * arch.head_dim != arch.hidden_size,
            "biases of query, key and value alone": arch.qkv_bias and not arch.attention_out_bias,
            "no shared experts": arch.shared_ffn_size == 0 and "shared_fc1" in self.names,
            "dense layers": arch.moe_pattern is not None,
            "expert weights that do not sum to one": not arch.norm_topk,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        """See `MoeFamily.expert_settings`."""
        return {
            "num_local_experts": arch.num_experts,
            "intermediate_size": arch.expert_ffn_size,
            "attention_bias": arch.attention_out_bias,
            "embedding_multiplier": arch.embedding_multiplier,
            "attention_multiplier": arch.softmax_scale,
            "residual_multiplier": arch.residual_multiplier,
            "logits_scaling": arch.logits_scaling,
        }


FAMILY = GraniteMoe(
    title="GraniteMoe",
    hf_class="GraniteMoeForCausalLM",
    model_type="granitemoe",
    names=NAMES,
    defaults=DEFAULTS,
    has_multipliers=True,
    has_attention_bias=True,
    no_parent_because="whose experts lie in one tensor",
)
