"""Qwen2-MoE: shared experts, dense layers, biases of query, key and value, combine weights not summing to one."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, ZERO_FILLED, ConfigValues, zero_filled
from nemo_upcycle.models.families.routed import ROUTED_NAMES, RoutedFamily


_MLP = llama.LAYER + "mlp."
_SHARED = _MLP + "shared_expert."
#: Number of neurons in a shared expert that holds only zeros. The number is divisible as tensor parallelism and the
#: kernels of servers require.
_SHARED_WIDTH = 64
#: Weight of a gate, in place of zero, because llama.cpp divides by this weight. The sigmoid of a sum of numbers that
#: are so small is exactly one half.
_NEARLY_ZERO = 2.0**-100


class Qwen2Moe(RoutedFamily):
    """Qwen2-MoE's class, and base of other classes with the same experts."""

    @property
    def _has_biases(self) -> bool:
        """Whether query, key and value always have biases."""
        return bool(self.defaults.get("qkv_bias"))

    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """See `Family.experts`."""
        shared = config.whole("shared_expert_intermediate_size", 0, least=0)
        zeros = zero_filled(config)
        shared = 0 if "shared_expert" in zeros else shared
        return super().experts(config, num_layers) | {
            "shared_ffn_size": shared,
            "shared_gate": shared > 0 and "shared_gate" not in zeros,
            "qkv_bias": config.flag("qkv_bias") and "qkv_bias" not in zeros,
        }

    def limits(self, arch: Architecture) -> dict[str, bool]:
        """See `MoeFamily.limits`."""
        return super().limits(arch) | {
            "heads that do not make up the hidden size": arch.num_heads * arch.head_dim != arch.hidden_size,
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        """See `MoeFamily.expert_settings`."""
        zeros = {"qkv_bias": self._has_biases and not arch.qkv_bias, "shared_expert": not arch.shared_ffn_size}
        zeros["shared_gate"] = arch.shared_ffn_size > 0 and not arch.shared_gate
        return super().expert_settings(arch) | {
            "shared_expert_intermediate_size": arch.shared_ffn_size or _SHARED_WIDTH,
            "qkv_bias": True,
            ZERO_FILLED: [name for name, absent in zeros.items() if absent],
        }

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the parts that the class requires and the model lacks, such as the gate of the shared expert.

        The class multiplies its shared expert by the sigmoid of the gate. A gate of nearly zero gives one half, and
        `hf_factors` doubles the shared down projection to make up for it. The gate is not exactly zero, because
        llama.cpp divides by it. vLLM and SGLang cannot read a folder that lacks biases of query, key and value, or
        whose shared expert has no neurons.
        """
        gate = () if arch.shared_gate else self.names["shared_gate"]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(gate, (1, arch.hidden_size))
        if not arch.shared_ffn_size:
            shapes |= dict.fromkeys(self.names["shared_fc1"], (_SHARED_WIDTH, arch.hidden_size))
            shapes |= dict.fromkeys(self.names["shared_fc2"], (arch.hidden_size, _SHARED_WIDTH))
        zeros = self.in_moe_layers(shapes, arch)
        if arch.qkv_bias or not self._has_biases:
            return zeros
        widths = (arch.num_heads * arch.head_dim, *[arch.num_kv_heads * arch.head_dim] * 2)
        biases = dict(zip(self.names["qkv_bias"], widths, strict=True))
        return zeros | {
            name.format(layer=layer): (width,) for layer in range(arch.num_layers) for name, width in biases.items()
        }


FAMILY = Qwen2Moe(
    title="Qwen2-MoE",
    hf_class="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    names=llama.NAMES
    | ROUTED_NAMES
    | {
        "shared_fc1": tuple(_SHARED + f"{part}_proj.weight" for part in ("gate", "up")),
        "shared_fc2": (_SHARED + "down_proj.weight",),
        "shared_gate": (_MLP + "shared_expert_gate.weight",),
    },
    defaults=COMMON_DEFAULTS | {"num_key_value_heads": 16, "max_position_embeddings": 32768, "qkv_bias": True},
    hf_factors={"shared_fc2": 2.0},
    constant_values={"shared_expert_gate.weight": _NEARLY_ZERO},
)
