"""GraniteMoeShared: GraniteMoe with shared experts beside the routed ones."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import granite4, granite_moe
from nemo_upcycle.models.families.base import ConfigValues
from nemo_upcycle.models.families.granite import DEFAULTS


class _GraniteMoeShared(granite_moe.GraniteMoe):
    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        shared = {"shared_ffn_size": config.whole("shared_intermediate_size", 1024, least=0)}
        return super().experts(config, num_layers) | shared

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        return super().expert_settings(arch) | {"shared_intermediate_size": arch.shared_ffn_size}


FAMILY = _GraniteMoeShared(
    title="GraniteMoeShared",
    hf_class="GraniteMoeSharedForCausalLM",
    model_type="granitemoeshared",
    names=granite_moe.NAMES | {"shared_fc1": granite4.FAMILY.names["fc1"], "shared_fc2": granite4.FAMILY.names["fc2"]},
    defaults=DEFAULTS,
    has_multipliers=True,
    has_attention_bias=True,
    no_parent_because="whose experts lie in one tensor",
)
