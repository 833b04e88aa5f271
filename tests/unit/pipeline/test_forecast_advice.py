"""The line of a forecast that says whether upcycling is expected to pay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from nemo_upcycle.pipeline.forecast import render_forecast
from nemo_upcycle.pipeline.stages import STAGES
from tests.golden.forecasts import forecast_of
from tests.unit.pipeline.markers import finish


def test_a_forecast_advises_with_the_runs_own_numbers(llama: Any, tmp_path: Path) -> None:
    """The parent is one that is known, and the baseline is trained on as many tokens."""
    found = forecast_of(llama, tmp_path)
    assert found.advice.startswith("e8t2 after 15T + 100B tokens: ")
    assert found.advice.endswith("--trained-on 15T --tokens 100B --experts 8 --top-k 2 --gpus 512")
    section = render_forecast(found).partition("\nDoes it pay\n")[2].partition("\n\n")[0]
    assert " ".join(section.split()) == found.advice
    finish(llama, tmp_path, "import", "data", "upcycle")
    assert "Does it pay" in render_forecast(forecast_of(llama, tmp_path, stages=STAGES[3:5]))
    assert "Does it pay" not in render_forecast(forecast_of(llama, tmp_path, stages=STAGES[4:5]))


def test_tokens_of_the_parent_that_a_user_gives_are_shown_and_count(llama: Any, tmp_path: Path) -> None:
    chain = copy.deepcopy(llama)
    chain.dense = "hf://mine/dense"
    assert "add trained_on=15T" in forecast_of(chain, tmp_path).advice
    chain.trained_on = "300B"
    found = forecast_of(chain, tmp_path)
    assert found.advice.startswith("e8t2 after 300B + 100B tokens: ")
    assert ("trained_on", "300B") in [(one.name, one.value) for one in found.settings]
