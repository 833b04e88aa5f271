"""Parents that Bridge's classes cannot represent, models without weights and missing tokenizers are refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.planning.hardware import known_shape
from tests.bridge.runs import VOCABULARY, bridges_pretrain, hooked, run_config
from tests.distributed.ranks import run_ranks
from tests.models import LLAMA3_SCALING, write_llama, write_tokenizer


SPEC = UpcycleSpec(num_experts=4, top_k=2)


@pytest.mark.parametrize("style", ["upcycled_provider", "upcycled_config"])
@pytest.mark.parametrize(
    ("changes", "pattern", "words"),
    [
        ({"scaled_embedding": True}, {"hybrid_layer_pattern": "*E" * 32}, "multiplies its embedding by sqrt"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "Rope_scaling of the dense checkpoint"),
        ({"rope_scaling": LLAMA3_SCALING}, {"hybrid_layer_pattern": "*E" * 32}, "HybridModel scales no rotary"),
    ],
    ids=["scaled embedding of a HybridModel", "RoPE scaling", "RoPE scaling of a HybridModel"],
)
def test_a_parent_that_bridges_model_cannot_be_is_refused(
    changes: dict[str, Any], pattern: dict[str, str], words: str, style: str
) -> None:
    from nemo_upcycle.trainers.bridge import models

    parent = replace(known_shape("llama3_8b"), **changes)
    with pytest.raises(SpecError, match=words):
        getattr(models, style)(parent, UpcycleSpec(num_experts=8, top_k=2), seq_length=64, **pattern)


@pytest.mark.parametrize("style", ["provider", "builder"])
def test_a_model_that_nothing_filled_refuses_its_first_step(dense: Path, tmp_path: Path, style: str) -> None:
    assert run_ranks(_field_of_refusal, 1, dense, tmp_path / "run", style, process_group=False) == ["config.model"]
    assert not (tmp_path / "run").exists()


def _field_of_refusal(dense: Path, run: Path, style: str) -> str:
    pretrain = bridges_pretrain()
    config = run_config(dense, run, SPEC, style=style)
    with pytest.raises(SpecError) as refused:
        pretrain(config)
    return refused.value.field


def test_a_model_that_is_set_later_is_filled(dense: Path, tmp_path: Path) -> None:
    run_ranks(_train_another_model, 1, dense, tmp_path / "run", process_group=False)
    assert (tmp_path / "run/iter_0000001").is_dir()


def _train_another_model(dense: Path, run: Path) -> None:
    pretrain = bridges_pretrain()
    config = hooked(dense, run, asdict(SPEC))
    config.model = run_config(dense, run, SPEC).model
    pretrain(config)


def test_a_model_of_an_architecture_may_start_from_random_weights(dense: Path, tmp_path: Path) -> None:
    run_ranks(_train_from_random_weights, 1, dense, tmp_path / "run", process_group=False)
    assert (tmp_path / "run/iter_0000001").is_dir()


def _train_from_random_weights(dense: Path, run: Path) -> None:
    pretrain = bridges_pretrain()
    pretrain(run_config(read_architecture(dense), run, SPEC))


def test_a_run_without_a_tokenizer_gets_the_parents(tmp_path: Path) -> None:
    from nemo_upcycle.trainers.bridge.upcycling import prepare

    dense = write_llama(tmp_path / "dense", tied=True, vocab_size=VOCABULARY)
    config = hooked(dense, tmp_path / "run", asdict(SPEC))
    config.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    with pytest.raises(CheckpointError, match=rf"Folder {dense} has no tokenizer"):
        prepare(config)
    write_tokenizer(dense)
    prepare(config)
    assert config.tokenizer.tokenizer_model == str(dense)
    config.tokenizer.tokenizer_model = "/models/mine"
    prepare(config)
    assert config.tokenizer.tokenizer_model == "/models/mine"
