"""What a part of the chain needs from the stages before it."""

from __future__ import annotations

import json

from nemo_upcycle.pipeline.order import before
from nemo_upcycle.pipeline.stages import RunPlan


def plan_of() -> RunPlan:
    # Bridge's trainings give their settings without being built.
    training = json.dumps({"recipe": "tiny", "overrides": []})
    return RunPlan("tiny", "asset://smollm2-135m", "sotu", "demo", training, training, trainer="bridge")


def test_a_stage_needs_what_those_that_it_reads_need() -> None:
    needed = [stage.name for stage in before(plan_of(), "export")]
    assert needed == ["import", "data", "pretrain", "dense_ct"]  # an export needs no check of step 0
    assert [stage.name for stage in before(plan_of(), "pretrain")] == ["import", "data", "upcycle"]
