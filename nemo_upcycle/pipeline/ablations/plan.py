"""The plan of a grid: its parent, its data, and a training for each arm and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nemo_upcycle.pipeline.markers import STEPS
from nemo_upcycle.pipeline.plan import Plan, Stage
from nemo_upcycle.reporting.grid_evidence import PLAN as GRID


#: The folder of the suite that all trainings are scored with, in the grid's folder.
SUITE = "suite/items"


@dataclass(frozen=True)
class GridPlan(Plan):
    """Everything that the stages of a grid need to know, as plain values.

    Args:
        name: of the grid.
        dense: address of the dense parent; "" where the grid trains its own.
        data: a blend, or a finished folder.
        parent: the serialised recipe that trains the parent from random weights; None with `dense`.
        vocabulary: tokens of its tokenizer, which is trained on the blend.
        suite: a name in `conf/evaluation`, or a YAML file, of what all trainings are scored with.
        cells: name of each training -> its serialised recipe.
        described: what the table needs: of each cell its arm, seed, tokens of a step, steps and schedule of the
            learning rate; the references; the margin; what each arm is about.
    """

    file: ClassVar[str] = GRID
    kind: ClassVar[str] = "a grid of ablations"
    files: ClassVar[Mapping[str, str]] = {"data": "data", "suite": "evaluation"}

    name: str
    dense: str
    data: str
    parent: str | None
    vocabulary: int | None
    suite: str
    cells: dict[str, str]
    described: dict[str, Any]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Plan.stages`."""
        from nemo_upcycle.pipeline.ablations.stages import stages_of

        return stages_of(self)

    def setting(self, name: str) -> Any:
        """See `Plan.setting`: a field, or the recipe of a cell or how many steps it takes."""
        if name.endswith(STEPS):
            return self.training_settings(name.removesuffix(STEPS)).steps
        return self.training_settings(name).fixed if self.training_text(name) else self.content_of(name)

    def training_text(self, stage: str) -> str | None:
        """See `Plan.training_text`."""
        return self.parent if stage == "parent" else self.cells.get(stage)

    def inputs(self) -> tuple[str, ...]:
        """See `Plan.inputs`."""
        return self.dense, self.data, self.suite

    @property
    def blend(self) -> str | None:
        """See `Plan.blend`."""
        return None if Path(self.data).is_dir() else self.data
