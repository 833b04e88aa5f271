"""What FP8 lost is told by arm and operand: the first step, whose scales are 1, apart from the others."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.reporting.grid_fp8 import compare_fp8, fp8_section


def _losses(first: float) -> dict[str, list[float]]:
    found = {}
    for operand, amax in (("input", 12.0), ("weight", 0.375), ("gradient", 0.002)):
        found |= {f"{operand}/amax": [amax, amax / 2, amax / 4], f"{operand}/underflow": [first, 0.01, 0.03]}
        found[f"{operand}/saturated"] = [first / 1000, 1e-6, 2e-6]
    return found


def _evidence() -> dict[str, Any]:
    cells = {"bf16-seed1": {}, "delayed-seed1": {"fp8": _losses(0.2)}, "delayed-seed2": {"fp8": _losses(0.4)}}
    described = {name: {"arm": name.partition("-")[0]} for name in cells}
    return {"described": {"cells": described}, "cells": cells}


def test_the_first_step_stands_apart_and_seeds_are_joined() -> None:
    found = compare_fp8(_evidence())
    assert list(found) == ["delayed"]
    assert found["delayed"]["gradient"] == {
        "amax": 0.002,
        "underflow_first": 0.3,
        "underflow_later": 0.02,
        "saturated_first": 0.0004,
        "saturated_later": 2e-6,
    }


def test_a_row_has_the_three_operands_and_a_grid_without_fp8_no_section() -> None:
    text = fp8_section(compare_fp8(_evidence()))
    row = "| delayed | 12 / 0.375 / 0.002 | 30 / 30 / 30 | 2 / 2 / 2 | 4e+02 / 4e+02 / 4e+02 | 2 / 2 / 2 |"
    assert row in text
    assert fp8_section(compare_fp8({"described": {"cells": {"a": {"arm": "a"}}}, "cells": {"a": {}}})) == ""
