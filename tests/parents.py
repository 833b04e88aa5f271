"""Random checkpoints of further families, as `tests.models` writes a Llama."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests.models import write_parent


#: Positions that a model was stretched to, four times as many as it was trained with, for texts of 32 tokens.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def write_olmo3(folder: Path, *, window: int = 5, tied: bool = False, layers: int = 4, **changes: Any) -> Path:
    """Write a random OLMo 3, whose attention sees a window but in every fourth layer, as `write_llama` does."""
    from transformers import Olmo3Config, Olmo3ForCausalLM

    changes = {"head_dim": None, "pad_token_id": 0, "sliding_window": window} | changes
    return write_parent(folder, Olmo3ForCausalLM, Olmo3Config, tied, layers, 1, changes)


#: Factors of a Granite, none of which is its class's default.
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.15,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}


def write_granite(folder: Path, *, tied: bool = False, layers: int = 2, **changes: Any) -> Path:
    """Write a random Granite 3, which multiplies by constants, as `write_llama` writes a Llama."""
    from transformers import GraniteConfig, GraniteForCausalLM

    changes = {"head_dim": None, "pad_token_id": 0} | GRANITE | changes
    return write_parent(folder, GraniteForCausalLM, GraniteConfig, tied, layers, 1, changes)


def write_granite4(folder: Path, *, tied: bool = True, layers: int = 2, **changes: Any) -> Path:
    """Write a random Granite 4 without experts and Mamba layers, as `write_llama` writes a Llama."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    changes = {"intermediate_size": 96} | GRANITE | changes
    changes |= {"shared_intermediate_size": changes.pop("intermediate_size"), "intermediate_size": 32}
    changes |= {"head_dim": None, "pad_token_id": 0, "num_local_experts": 0, "mamba_n_heads": 1}
    changes |= {"position_embedding_type": "rope", "layer_types": ["attention"] * layers}
    write_parent(folder, GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, tied, layers, 1, changes)
    config = json.loads((folder / "config.json").read_text())
    config.pop("time_step_limit", None)  # of Mamba layers: transformers 5 writes one that it does not read again
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gemma(folder: Path, *, layers: int = 2, **changes: Any) -> Path:
    """Write a random Gemma, which multiplies its embedding and whose norms are around one, as `write_llama` does."""
    from transformers import GemmaConfig, GemmaForCausalLM

    return write_parent(folder, GemmaForCausalLM, GemmaConfig, True, layers, 1, changes)


def write_gemma3(folder: Path, *, window: int = 5, tied: bool = True, layers: int = 6, **changes: Any) -> Path:
    """Write a random Gemma 3, whose layers but every sixth see a window and have another rotary base."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    changes = {"sliding_window": window, "query_pre_attn_scalar": 24} | changes
    return write_parent(folder, Gemma3ForCausalLM, Gemma3TextConfig, tied, layers, 1, changes)


def write_ministral3(folder: Path, *, tied: bool = False, layers: int = 2, **changes: Any) -> Path:
    """Write a random Ministral 3, whose scores begin to grow at position 64: transformers 5 alone has the class."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "max_position_embeddings": 256}
    changes = {"rope_parameters": rope, "rope_theta": None, "max_position_embeddings": 256} | changes
    return write_parent(
        folder, Ministral3ForCausalLM, Ministral3Config, tied, layers, 1, {"pad_token_id": 0} | changes
    )


#: Class of models with experts -> settings that are not those of all, or not its defaults.
_OF_MOE: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 48, "norm_topk_prob": True},
    "Qwen2Moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "head_dim": None},
    "Glm4Moe": {
        "moe_intermediate_size": 48,
        "routed_scaling_factor": 2.5,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "FlexOlmo": {"head_dim": None, "pad_token_id": 0},
}


def write_moe(folder: Path, kind: str, *, tied: bool = False, layers: int = 2, **changes: Any) -> Path:
    """Write a random parent of 4 experts, 2 for a token, as `write_llama` writes a Llama."""
    import transformers

    count = {"Mixtral": "num_local_experts", "Glm4Moe": "n_routed_experts"}.get(kind, "num_experts")
    sizes = {count: 4, "num_experts_per_tok": 2} | _OF_MOE.get(kind, {})
    model_class, config_class = (getattr(transformers, kind + what) for what in ("ForCausalLM", "Config"))
    return write_parent(folder, model_class, config_class, tied, layers, 1, sizes | changes)


write_mixtral, write_qwen3_moe, write_olmoe = (
    partial(write_moe, kind=kind) for kind in ("Mixtral", "Qwen3Moe", "Olmoe")
)
