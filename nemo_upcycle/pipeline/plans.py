"""Which kind of run a folder holds, and its plan."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.pipeline.ablations.stages import GridPlan
from nemo_upcycle.pipeline.plan import Plan
from nemo_upcycle.pipeline.stages import RunPlan


def kind_of(run_dir: Path) -> type[Plan] | None:
    """Return the kind of the plan that a run's folder holds; None without one."""
    kinds: tuple[type[Plan], ...] = (RunPlan, GridPlan)
    return next((kind for kind in kinds if (run_dir / kind.file).is_file()), None)


def read_plan(run_dir: Path) -> Plan:
    """Read the plan of a run."""
    return (kind_of(run_dir) or RunPlan).read(run_dir)
