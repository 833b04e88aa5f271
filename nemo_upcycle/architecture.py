"""Shapes of dense and MoE models, read from a Hugging Face `config.json`, and their parameter counts.

Legend of shape suffixes used in the package: E experts, F intermediate (FFN) dim, D model dim, V vocabulary,
H attention heads, G key-value groups, K head dim, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError, problem
from nemo_upcycle.files import read_json


#: Hugging Face classes whose tensors the mapping table knows, dense and MoE.
DENSE_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")
MOE_CLASSES = ("MixtralForCausalLM",)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything about a decoder that decides shapes, and what has to travel with its weights."""

    hf_class: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    activation: str = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_positions: int = 4096
    num_experts: int | None = None
    top_k: int | None = None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def ffn_params(self) -> int:
        """Parameters of one gated feed-forward network: gate, up and down."""
        return 3 * self.ffn_size * self.hidden_size

    @property
    def total_params(self) -> int:
        """All parameters; tied embeddings count once.

        Example:
            Llama 3 8B has 8_030_261_248, its eight-expert upcycling 47_491_321_856.
        """
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        router = (self.num_experts or 0) * self.hidden_size
        layer = attention + (self.num_experts or 1) * self.ffn_params + router + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through."""
        idle = (self.num_experts or 1) - (self.top_k or 1)
        return self.total_params - self.num_layers * idle * self.ffn_params

    def with_experts(self, num_experts: int, top_k: int) -> Architecture:
        """Return the Mixtral-shaped architecture that upcycling makes of this dense one."""
        return replace(self, hf_class="MixtralForCausalLM", num_experts=num_experts, top_k=top_k)


def _positive(config: dict[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(
            problem(f"{where}: {key}", got=value, expected="a positive whole number", fix="mend config.json")
        )
    return value


def _class_of(config: dict[str, Any], where: str) -> str:
    names = config.get("architectures") or []
    known = DENSE_CLASSES + MOE_CLASSES
    if len(names) != 1 or names[0] not in known:
        raise CheckpointError(
            problem(
                f"{where}: architectures",
                got=names or "nothing",
                expected=f"a Llama-family model ({', '.join(known)})",
                fix="use a checkpoint of one of these classes",
            )
        )
    return str(names[0])


def architecture_from_config(config: dict[str, Any], where: str = "config.json") -> Architecture:
    """Return the architecture that a Hugging Face configuration describes.

    Args:
        config: the parsed `config.json`.
        where: how messages call the file.

    Raises:
        CheckpointError: the class is not known, a size is missing or sizes contradict each other.
    """
    hf_class = _class_of(config, where)
    heads = _positive(config, "num_attention_heads", where)
    hidden = _positive(config, "hidden_size", where)
    moe = hf_class in MOE_CLASSES
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(
                problem(f"{where}: {key}", got=True, expected="no bias", fix="use a checkpoint without biases")
            )
    found = Architecture(
        hf_class=hf_class,
        num_layers=_positive(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_size=_positive(config, "intermediate_size", where),
        num_heads=heads,
        num_kv_heads=_positive(config, "num_key_value_heads", where) if "num_key_value_heads" in config else heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=_positive(config, "vocab_size", where),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        activation=config.get("hidden_act", "silu"),
        norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        rope_theta=float(config.get("rope_theta", 10000.0)),
        rope_scaling=config.get("rope_scaling"),
        max_positions=int(config.get("max_position_embeddings", 4096)),
        num_experts=_positive(config, "num_local_experts", where) if moe else None,
        top_k=_positive(config, "num_experts_per_tok", where) if moe else None,
    )
    _check(found, where)
    return found


def _check(found: Architecture, where: str) -> None:
    if found.num_heads % found.num_kv_heads:
        raise CheckpointError(
            problem(
                f"{where}: num_key_value_heads",
                got=found.num_kv_heads,
                expected=f"a divisor of num_attention_heads ({found.num_heads})",
                fix="mend config.json",
            )
        )
    if found.activation != "silu":
        raise CheckpointError(
            problem(f"{where}: hidden_act", got=found.activation, expected="silu", fix="use a SwiGLU checkpoint")
        )


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture of a Hugging Face folder.

    Raises:
        CheckpointError: the folder or its `config.json` is missing, or describes no Llama-family model.

    Example:
        >>> read_architecture(Path("runs/demo/dense")).num_layers  # doctest: +SKIP
        30
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            problem(
                str(folder),
                got="no config.json" if folder.is_dir() else "no such folder",
                expected="a Hugging Face folder with config.json and *.safetensors",
                fix="check the path",
            )
        )
    return architecture_from_config(read_json(path), str(path))
