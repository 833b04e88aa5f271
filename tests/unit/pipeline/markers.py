"""Finished stages, as far as the next run looks at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.pipeline.stages import BY_NAME
from tests.golden.forecasts import plan_of


def finish(chain: Any, run_dir: Path, *names: str) -> None:
    """Leave what finished stages leave: their markers."""
    plan = plan_of(chain)
    for name in names:
        folder, inputs = BY_NAME[name].folder(run_dir, plan), BY_NAME[name].inputs(run_dir, plan)
        folder.start(inputs, resumable=False)
        folder.finish(inputs, 1.0, {})
