"""A model with all of its parent's weights but with other settings is not accepted as the parent's child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.compared_weights import compare_weights
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from tests.folders import SPEC, change_config, converted
from tests.models import hugging_face_logits, sample_tokens, write_llama


def _equal(dense: Path, moe: Path) -> bool:
    with open_dense(dense) as parent, SafetensorsFolder(moe) as child:
        return compare_weights(parent, child)[1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "activation"),
        ({"rope_parameters": ..., "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": ..., "rope_theta": 1e6}, "rope_theta"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"sliding_window": 16}, "window"),
    ],
)
def test_a_child_with_other_settings_is_not_the_parents(dense: Path, tmp_path: Path, change: Any, name: str) -> None:
    moe = converted(dense, tmp_path / "moe").output
    assert _equal(dense, moe)
    with pytest.raises(CheckpointError) as caught:
        _equal(dense, change_config(moe, **change))
    assert caught.value.subject.rpartition(": ")[2] == name


@pytest.mark.parametrize(
    "spec", [SPEC, UpcycleSpec(num_experts=4, top_k=2, granularity=2, shared_experts=1)], ids=["mixtral", "qwen2_moe"]
)
def test_a_parent_with_default_settings_has_an_exact_child(tmp_path: Path, spec: UpcycleSpec) -> None:
    """Llama 2's config omits the rotary base; the default is 10,000 in a Llama and a million in a Mixtral."""
    dense = write_llama(tmp_path / "dense", layers=2, rope_theta=10000.0, rms_norm_eps=1e-6)
    unsaid = ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "max_position_embeddings", "head_dim")
    change_config(dense, **dict.fromkeys(unsaid, ...))
    moe = converted(dense, tmp_path / "moe", spec).output
    assert _equal(dense, moe)
    parent, child = (hugging_face_logits(folder, sample_tokens(250)) for folder in (dense, moe))
    assert parent.abs().max() > 1.0
    assert (child - parent).abs().max() <= 1e-5
