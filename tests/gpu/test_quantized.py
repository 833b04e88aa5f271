"""Tests of FP8 and FP4 parameters with Transformer Engine's quantizers and with a whole training, on a GPU.

    python -m pytest -m gpu tests/gpu/test_quantized.py

The tests need one H100, and one B200 for MXFP8 and NVFP4. `tests/te/test_quantized.py` has the tests without a GPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.cpu.one_rank import one_rank
from nemo_upcycle.online.quantized import is_quantized
from nemo_upcycle.planning.layout import Layout
from tests.gpu.needs import NEEDS_CARD
from tests.gpu.one_card import PRECISIONS, Sizes, prepare, train
from tests.models import MemorySource
from tests.te.test_quantized import (
    ARCH,
    CLASSES,
    build,
    check_masters,
    exact_values,
    keeps_values,
    optimizer_of,
    parameters_of,
    wrapped_in_ddp,
)


pytestmark = NEEDS_CARD
SPEC, ONE_RANK = UpcycleSpec(num_experts=4, top_k=2), Layout(gpus=1)
#: Format -> (a, b). The allowed error is a times the value, plus b times the largest value of the tensor.
TOLERANCES = {"nvfp4": (0.25, 0.1)}
FP8_TOLERANCES = (1 / 16, 1 / 448 / 2**8)


@pytest.mark.parametrize("order", ["fill, wrap: Bridge", "wrap, fill: NeMo"])
@pytest.mark.parametrize("recipe", CLASSES)
def test_the_quantizers_of_transformer_engine_get_the_dense_values(recipe: str, order: str) -> None:
    if recipe in ("mxfp8", "nvfp4") and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs Blackwell")
    relative, absolute = TOLERANCES.get(recipe, FP8_TOLERANCES)
    with one_rank():
        wanted = exact_values(SPEC, ONE_RANK, use_cpu_initialization=False)
        chunks = build(SPEC, ONE_RANK, recipe, use_cpu_initialization=False)
        if order == "fill, wrap: Bridge":
            receipt = upcycle_into(chunks, MemorySource(ARCH), SPEC)
            wrapped = wrapped_in_ddp(chunks, recipe)
        else:
            wrapped = wrapped_in_ddp(chunks, recipe)
            receipt = upcycle_into(wrapped, MemorySource(ARCH), SPEC)
        for name, parameter in parameters_of(chunks).items():
            values = wanted[name].float()
            if is_quantized(parameter):
                assert type(parameter).__name__ == CLASSES[recipe]
                difference = (parameter.dequantize().float() - values).abs()
                assert (difference <= relative * values.abs() + absolute * values.abs().max()).all(), name
            else:
                assert torch.equal(parameter.float(), values), name
        assert receipt.exact_masters is keeps_values(recipe)
        if keeps_values(recipe):
            check_masters(optimizer_of(wrapped, recipe), chunks, wanted)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return prepare(tmp_path_factory.mktemp("quantized"), Sizes())


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "bf16"])
def test_a_training_starts_where_it_does_with_parameters_in_bf16(inputs: tuple[Path, Path], precision: str) -> None:
    """Both runs use the same FP8 weights, except that delayed scaling first casts BF16 weights with a scale of 1."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in (precision, f"{precision}+params"):
        runs[name] = train(Sizes(), *inputs, inputs[0].parent / name, name)
    plain, low = ([line["loss"] for line in run] for run in runs.values())
    assert all(map(math.isfinite, low))
    assert low[0] == pytest.approx(plain[0], rel=2e-2)
    assert low[-1] == pytest.approx(plain[-1], rel=5e-2)
    receipt = json.loads((inputs[0].parent / f"{precision}+params" / "receipt.json").read_text())
    assert receipt["exact_masters"]
    assert CLASSES[PRECISIONS[precision] or ""] in {record["dtype"] for record in receipt["parameters"]}
