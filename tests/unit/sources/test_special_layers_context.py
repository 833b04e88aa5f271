"""A checkpoint says what its layers have that no Llama's have, and a parent whose layers differ is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.layer_settings import MULTIPLIERS, decoder_settings, window_fields
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.sources.checkpoint_context import CheckpointContext


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GRANITE = SIZES | {"architectures": ["GraniteForCausalLM"], "vocab_size": 250, "attention_multiplier": 0.15}
GRANITE |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0}


def _saved(arch: Architecture, folder: Path) -> CheckpointContext:
    """Return what Bridge's `run_config.yaml` says of a model."""
    layers = {"_target_": "nemo_upcycle.online.decoder_layers.decoder_layers", "_partial_": True, "_args_": []}
    settings = megatron_fields(arch) | window_fields(arch)
    settings |= {
        "_target_": "megatron.GPTModel",
        "activation_func": {"_target_": "torch.nn.functional.silu" if arch.activation == "silu" else "openai_gelu"},
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "rotary_base": arch.rope_theta,
        "seq_length": arch.max_positions,
        "transformer_layer_spec": layers | decoder_settings(arch),
    }
    return CheckpointContext(folder / "run_config.yaml", settings)


def test_a_granites_checkpoint_belongs_to_a_parent_with_its_multipliers(tmp_path: Path) -> None:
    arch = architecture_from_config(GRANITE)
    context = _saved(arch, tmp_path)
    context.require_parent(arch, tmp_path)
    for name in ("attention_multiplier", *MULTIPLIERS):
        with pytest.raises(CheckpointError, match="softmax_scale" if name.startswith("att") else name):
            context.require_parent(replace(arch, **{name: 0.5}), tmp_path)
    llama = architecture_from_config(SIZES | {"architectures": ["LlamaForCausalLM"], "vocab_size": 250})
    with pytest.raises(CheckpointError, match="softmax_scale"):
        context.require_parent(llama, tmp_path)
    with pytest.raises(CheckpointError, match="softmax_scale"):
        _saved(llama, tmp_path).require_parent(arch, tmp_path)


_WINDOWS = SIZES | {
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "vocab_size": 250,
    "sliding_window": 16,
    "head_dim": 16,
}
SPECIAL = {
    "OLMo 2": _WINDOWS | {"architectures": ["Olmo2ForCausalLM"]},
    "OLMo 3": _WINDOWS | {"architectures": ["Olmo3ForCausalLM"]},
    "EXAONE 4": _WINDOWS | {"architectures": ["Exaone4ForCausalLM"]},
    "EXAONE 4 without windows": _WINDOWS | {"architectures": ["Exaone4ForCausalLM"], "sliding_window": None},
    "Gemma 3": _WINDOWS | {"architectures": ["Gemma3ForCausalLM"]},
    "Gemma 3 for long texts": _WINDOWS
    | {"architectures": ["Gemma3ForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_a_checkpoint_belongs_to_a_parent_whose_norms_windows_and_positions_are_its_own(
    name: str, tmp_path: Path
) -> None:
    arch = architecture_from_config(SPECIAL[name])
    _saved(arch, tmp_path).require_parent(arch, tmp_path)
    assert _saved(arch, tmp_path).model(arch.vocab_size).hf_class == arch.hf_class
    others = [{"post_norm": False}, {"window_pattern": (True,) * 7 + (False,)}]
    others += [{"local_rope_theta": 1234.0}] if arch.local_rope_theta else []
    for other in others:
        with pytest.raises(CheckpointError, match=next(iter(other))):
            _saved(arch, tmp_path).require_parent(replace(arch, **other), tmp_path)


def test_positions_of_an_exaone_in_other_layers_than_its_windows_are_refused(tmp_path: Path) -> None:
    arch = architecture_from_config(SPECIAL["EXAONE 4"])
    context = _saved(arch, tmp_path)
    context.settings["no_rope_freq"] = [1, 0] * 4
    with pytest.raises(CheckpointError, match="no_rope_freq"):
        context.require_parent(arch, tmp_path)
