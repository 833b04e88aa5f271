"""lm-eval gets the same answers from a checkpoint on real gloo ranks as from its exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.data.suites.suite import build_suite
from nemo_upcycle.data.suites.suite_config import HeldoutConfig, SuiteConfig
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.backends import ModelOptions
from nemo_upcycle.evaluation.compare import compare_items
from nemo_upcycle.evaluation.run import evaluate
from tests.distributed.ranks import run_ranks
from tests.distributed.saved import save_upcycled
from tests.models import write_llama, write_tokenizer
from tests.unit.evaluation.conftest import DOCUMENTS, QUESTIONS


pytestmark = pytest.mark.full
SPEC = UpcycleSpec(num_experts=4, top_k=2, method="noise", router_std=1.0)
TASKS = {"mmlu_letter": [0], "mmlu_answer": [0], "heldout_perplexity": [0]}


SPEC_FIELDS = {name: getattr(SPEC, name) for name in ("num_experts", "top_k", "router_order")}


def _evaluate(folder: str, layout: dict[str, int], part: str = "", damage: Any = None) -> dict[str, Any] | str:
    """Evaluate the checkpoint and return the first rank's result; the other ranks serve the first.

    Args:
        folder: folder of the checkpoint and its parent.
        layout: layout sizes other than 1.
        part: loader in `evaluation.megatron.lm` whose result is damaged.
        damage: function that damages the loader's result.
    """
    from nemo_upcycle.evaluation.megatron import lm

    if part:
        load = getattr(lm, part)

        def damaged(*arguments: Any) -> Any:
            loaded = load(*arguments)
            damage(loaded)
            return loaded

        setattr(lm, part, damaged)
    megatron = {"dense": f"{folder}/dense", **SPEC_FIELDS, **layout}
    suite, results = Path(folder) / "suite", Path(folder) / "results"
    try:
        return evaluate(Path(folder) / "saved", suite, results, name="saved", options=ModelOptions(megatron=megatron))
    except SystemExit as ended:
        return f"served, status {ended.code}"
    except UpcycleError as error:
        return str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    dense = write_tokenizer(write_llama(folder / "dense", vocab_size=259))
    run_ranks(save_upcycled, 2, str(dense), str(folder / "saved/weights"), SPEC, {"ep": 2})
    export_checkpoint(folder / "saved", dense, folder / "hf", spec=SPEC, dtype=torch.float32)
    build_suite(QUESTIONS, DOCUMENTS, folder / "suite", SuiteConfig(TASKS, heldout=HeldoutConfig(window_bytes=200)))
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Any]:
    return evaluate(folder / "hf", folder / "suite", folder / "results", name="hf")


@pytest.mark.parametrize(("ranks", "layout"), [(2, {"pp": 2}), (4, {"tp": 2, "ep": 2})], ids=str)
def test_a_checkpoint_answers_as_its_export(folder: Path, exported: Any, ranks: int, layout: dict[str, int]) -> None:
    first, *others = run_ranks(_evaluate, ranks, str(folder), layout)
    assert others == ["served, status 0"] * (ranks - 1)
    found = compare_items(exported, first)
    assert found["max_relative_loglikelihood_difference"] < 1e-5
    assert found["changed_answers"] == 0
    assert first["samples"] == exported["samples"]
    assert first["model"]["parameters"] == exported["model"]["parameters"]
    assert first["settings"]["backend"] == "megatron"


def _break_weight(loaded: Any) -> None:
    chunks, _ = loaded
    chunks[0].decoder.layers[0].self_attention.linear_qkv.weight.data[0] = float("nan")


def _add_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens([f"<more {number}>" for number in range(300 - len(tokenizer))])


@pytest.mark.parametrize(
    ("ranks", "part", "damage", "got"),
    [
        (2, "load_chunks", _break_weight, "texts are NaN or infinity"),
        (1, "load_tokenizer", _add_tokens, "The tokenizer has 300 tokens, but the model has only 259"),
    ],
)
def test_nan_and_another_vocabulary_are_named(folder: Path, ranks: int, part: str, damage: Any, got: str) -> None:
    first, *others = run_ranks(_evaluate, ranks, str(folder), {}, part, damage)
    assert got in first
    assert others == ["served, status 0"] * (ranks - 1)
