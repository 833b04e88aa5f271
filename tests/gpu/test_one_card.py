"""Tests that need a GPU: Transformer Engine's kernels in BF16 and FP8 under the recipe for H100s.

    python -m pytest -m gpu tests/gpu

The tests need one H100 with Transformer Engine and NeMo (NVIDIA's NeMo container has both). The command
`python -m benchmarks.one_card` makes the same runs and keeps the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch

from nemo_upcycle import open_dense, upcycle_into
from nemo_upcycle.convert.compared_logits import compare_logits
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.recipes import llama3_8b_dense_ct, llama3_8b_e8t2
from nemo_upcycle.trainers.equivalence import megatron_logits, one_rank
from tests.gpu.needs import NEEDS_CARD
from tests.gpu.one_card import PRECISIONS, Sizes, cut_down, planned_gib, prepare, train
from tests.models import hugging_face_logits, sample_tokens


pytestmark = NEEDS_CARD
SIZES = Sizes()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return prepare(tmp_path_factory.mktemp("one_card"), SIZES)


Runs = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(inputs: tuple[Path, Path]) -> Runs:
    """Metrics of one run in each precision; a run is trained when it is first needed."""
    return cache(lambda precision: train(SIZES, *inputs, inputs[0].parent / precision, precision))


EVERY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


@EVERY_PRECISION
def test_loss_goes_down(runs: Runs, precision: str) -> None:
    losses = [line["loss"] for line in runs(precision)]
    assert len(losses) == SIZES.steps
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "bf16"])
def test_fp8_starts_at_the_loss_of_bf16(runs: Runs, precision: str) -> None:
    assert runs(precision)[0]["loss"] == pytest.approx(runs("bf16")[0]["loss"], rel=2e-2)


@EVERY_PRECISION
def test_memory_is_what_the_planner_says(runs: Runs, precision: str) -> None:
    measured, planned = runs(precision)[-1]["memory_gib"], planned_gib(SIZES, precision)
    assert measured >= sum(planned[name] for name in ("weights", "gradients", "optimizer"))
    assert measured == pytest.approx(planned["total"], rel=0.15)


@EVERY_PRECISION
def test_rates_are_stated_against_the_peak_of_the_card(runs: Runs, precision: str) -> None:
    line = runs(precision)[-1]
    mfu = line["mfu"]["bf16" if precision == "bf16" else "fp8"]
    assert 0 < mfu["causal"] <= mfu["full"] < 1


def test_step_0_computes_what_the_parent_computes(inputs: tuple[Path, Path]) -> None:
    """In BF16 with Transformer Engine, the MoE and the parent have similar errors against the float32 parent."""
    tokens_BS = sample_tokens(256, batch=2, length=256)
    wanted_BSV = hugging_face_logits(inputs[0], tokens_BS)
    found = {}
    with one_rank(), open_dense(inputs[0]) as dense:
        for recipe in (llama3_8b_dense_ct, llama3_8b_e8t2):
            model = _build_bf16(recipe.model(), dense.architecture.vocab_size)
            if recipe is llama3_8b_e8t2:
                upcycle_into([model], dense, recipe.SPEC)
            else:
                load_dense_into([model], dense)
            found[recipe.__name__] = compare_logits(wanted_BSV, megatron_logits(model, tokens_BS).float())
    parent, moe = found.values()
    assert moe.mean_abs <= 1.2 * parent.mean_abs
    assert moe.max_abs <= 1.5 * parent.max_abs


def _build_bf16(model: Any, vocab_size: int) -> torch.nn.Module:
    cut_down(model.config, SIZES)
    config = fdl.build(model.config)
    config.bf16, config.params_dtype, config.autocast_dtype = True, torch.bfloat16, torch.bfloat16
    config.vocab_size, config.should_pad_vocab = vocab_size, False
    config.perform_initialization = False
    return config.configure_model(tokenizer=None).bfloat16().cuda().eval()
