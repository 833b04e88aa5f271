"""Under every layout, a checkpoint on real gloo ranks gives the same log-likelihoods as the exported folder."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.megatron.chunks import layout_here, load_chunks
from nemo_upcycle.evaluation.megatron.score import score
from tests.distributed.ranks import run_ranks
from tests.distributed.saved import save_upcycled
from tests.models import hugging_face_logits, write_llama
from tests.tiers import quick


VOCAB = 250
#: `router_std` and noise make the result depend on every expert and on the routing.
NOISE = UpcycleSpec(num_experts=4, top_k=2, method="noise", router_std=1.0)
SPECS = {
    "moe": NOISE,
    "softmax first": replace(NOISE, router_order="softmax_topk", output_scale="none"),
    "tied": NOISE,
    "mixed": replace(NOISE, num_experts=8, top_k=4, granularity=2, shared_experts=1, moe_layers=(0, 3)),
    "balanced": replace(NOISE, router_std=0.3, router_score="sigmoid"),
}
#: Settings of trainings that balance experts by biases instead of a loss.
BALANCED = {"moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "none"}
#: Rows that `make test` runs: model, number of ranks, layout.
DAILY: list[tuple[str, int, dict[str, int]]] = [
    ("moe", 1, {}),
    ("moe", 4, {"tp": 2, "ep": 2}),
    ("softmax first", 2, {"pp": 2, "vp": 2}),
    ("tied", 2, {"tp": 2}),
    ("mixed", 2, {"pp": 2}),
    ("balanced", 2, {"ep": 2}),
]
#: Further rows: model `moe` on more layouts, and each other model on two more layouts.
WEEKLY: list[tuple[str, int, dict[str, int]]] = [
    ("moe", 2, {}),
    ("moe", 2, {"tp": 2}),
    ("moe", 2, {"pp": 2}),
    ("moe", 2, {"pp": 2, "vp": 2}),
    ("moe", 2, {"ep": 2}),
    *((case, 4, {axis: 2, "ep": 2}) for case in SPECS for axis in ("tp", "pp") if (case, axis) != ("moe", "tp")),
]


def _sequences() -> list[tuple[list[int], int]]:
    """Return texts of many lengths; some differ only in their last token."""
    numbers = random.Random(5)
    found = []
    for _ in range(23):
        tokens = [numbers.randrange(VOCAB) for _ in range(numbers.randint(2, 30))]
        found.append((tokens, numbers.randint(1, len(tokens) - 1)))
    stem = [numbers.randrange(VOCAB) for _ in range(12)]
    return found + [([*stem, last], 1) for last in (3, 77, 249)]


def _scores(folder: str, case: str, layout: dict[str, int]) -> list[tuple[list[float], bool]]:
    saved, parent = Path(folder) / case / "saved", _parent(Path(folder), case)
    chunks, arch = load_chunks(saved, parent, SPECS[case], layout_here(**layout), torch.float32)
    return score(chunks, _sequences(), vocab_size=arch.vocab_size, batch_size=4)


def _parent(folder: Path, case: str) -> Path:
    return folder / ("tied dense" if case == "tied" else "dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    for name, tied in (("dense", False), ("tied dense", True)):
        write_llama(folder / name, tied=tied)
    for case, spec in SPECS.items():
        saved, fields = str(folder / case / "saved/weights"), BALANCED if case == "balanced" else {}
        run_ranks(save_upcycled, 2, str(_parent(folder, case)), saved, spec, {"ep": 2}, fields)
        export_checkpoint(
            folder / case / "saved", _parent(folder, case), folder / case / "hf", spec=spec, dtype=torch.float32
        )
    return folder


def _by_transformers(folder: Path, tokens: list[int], predicted: int) -> tuple[list[float], bool]:
    logits_SV = hugging_face_logits(folder, torch.tensor([tokens]))[0, -predicted - 1 : -1]
    targets = torch.tensor(tokens[-predicted:])
    likelihoods = logits_SV.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return likelihoods.tolist(), bool((logits_SV.argmax(dim=-1) == targets).all())


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[tuple[list[float], bool]]]:
    """Return the results of transformers for every sequence, with the exported folders."""
    return {case: [_by_transformers(folder / case / "hf", *one) for one in _sequences()] for case in SPECS}


@pytest.mark.parametrize(("case", "ranks", "layout"), quick([*DAILY, *WEEKLY], *DAILY), ids=str)
def test_every_layout_gives_the_log_likelihoods_of_the_exported_folder(
    folder: Path, expected: dict[str, Any], case: str, ranks: int, layout: dict[str, int]
) -> None:
    answers = run_ranks(_scores, ranks, str(folder), case, layout)
    assert all(answer == answers[0] for answer in answers)
    for (got, likeliest), (wanted, is_likeliest) in zip(answers[0], expected[case], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-5, atol=2e-5)
        assert likeliest == is_likeliest


@pytest.mark.parametrize(
    ("layout", "name"), [({"tp": 4}, "tp"), ({"ep": 3}, "ep"), ({"pp": 2}, "pp"), ({"tp": 0}, "tp")]
)
def test_a_layout_that_does_not_fit_is_refused(folder: Path, layout: dict[str, int], name: str) -> None:
    with pytest.raises(UpcycleError) as refused:
        load_chunks(folder / "moe/saved", folder / "dense", SPECS["moe"], layout_here(**layout), torch.float32)
    assert refused.value.subject == name
