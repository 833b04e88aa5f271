"""A checkpoint of a Granite says by what it multiplies, and a parent that multiplies by others is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.layer_settings import MULTIPLIERS, decoder_settings
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.sources.checkpoint_context import CheckpointContext


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GRANITE = SIZES | {"architectures": ["GraniteForCausalLM"], "vocab_size": 250, "attention_multiplier": 0.15}
GRANITE |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0}


def _saved(arch: Architecture, folder: Path) -> CheckpointContext:
    """Return what Bridge's `run_config.yaml` says of a model."""
    layers = {"_target_": "nemo_upcycle.online.decoder_layers.decoder_layers", "_partial_": True, "_args_": []}
    settings = megatron_fields(arch) | {
        "_target_": "megatron.GPTModel",
        "activation_func": {"_target_": "torch.nn.functional.silu"},
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
