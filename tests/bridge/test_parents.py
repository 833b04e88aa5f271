"""Parents are filled as Bridge's own loader fills them. Parents that only Bridge can read are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.utils.files import read_json, write_json
from tests.bridge.runs import SEQUENCE, SPEC, VOCABULARY, fill_twice, train_on_ranks
from tests.distributed.ranks import run_ranks
from tests.models import sample_tokens, write_class
from tests.parents import write_gemma, write_mimo


class MiMoConfig(transformers.Qwen2Config):  # type: ignore[misc]
    """The configuration class that MiMo's own repository ships as code."""

    model_type = "mimo"


transformers.AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
WRITERS: dict[str, Any] = {"MiMo": partial(write_mimo, predicts=False), "Gemma": write_gemma}


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("name", WRITERS)
def test_a_parent_has_the_bits_of_bridges_own_loader(tmp_path: Path, name: str, layout: dict[str, int]) -> None:
    folder = WRITERS[name](tmp_path / "dense", vocab_size=VOCABULARY)
    assert run_ranks(_fill_twice, 2, folder, tmp_path / "run", layout) == [[], []]


def _fill_twice(parent: Path, folder: Path, layout: dict[str, int]) -> list[str]:
    """Call `fill_twice` in a process that imported this module, so that MiMo's configuration is registered."""
    return fill_twice(parent, folder, layout)


def test_step_0_of_a_gemma_equals_its_parent(tmp_path: Path) -> None:
    folder = write_gemma(tmp_path / "dense", vocab_size=VOCABULARY)
    assert run_ranks(_step_0, 1, folder, process_group=False) == [(True, True)]


def _step_0(folder: Path) -> tuple[bool, bool]:
    from nemo_upcycle.trainers.bridge.models import upcycled_provider
    from nemo_upcycle.trainers.equivalence import check_step0

    spec, tokens = UpcycleSpec(**SPEC), sample_tokens(VOCABULARY, length=SEQUENCE)
    moe, dense = (upcycled_provider(folder, one, seq_length=SEQUENCE) for one in (spec, None))
    receipt = check_step0(moe, dense, folder, spec, tokens, None)
    return receipt.exact, receipt.equivalence["within_tolerance"]


def test_a_parent_that_only_bridge_reads_is_refused(tmp_path: Path) -> None:
    from nemo_upcycle.trainers.bridge.models import upcycled_provider

    folder = write_class("Nemotron", tmp_path, norm_eps=1e-5)
    with pytest.raises(CheckpointError, match=r"LayerNorms with biases.*Release 0\.2\.0 can finish"):
        upcycled_provider(folder, UpcycleSpec(**SPEC))


def test_names_the_release_that_finishes_a_bridge_filled_run(tmp_path: Path) -> None:
    dense, run = write_gemma(tmp_path / "dense", vocab_size=VOCABULARY), tmp_path / "run"
    train_on_ranks(1, dense, run, SPEC)
    receipt = read_json(run / "receipt.json")
    receipt["parameters"][0]["made_by"] = "copied by Megatron-Bridge's AutoMapping"
    write_json(run / "receipt.json", receipt)
    with pytest.raises(RuntimeError, match=r"Release 0\.2\.0 can finish"):
        train_on_ranks(1, dense, run, SPEC, steps=2)
