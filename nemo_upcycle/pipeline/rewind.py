"""Rewind a training of a run to a kept checkpoint, and continue from there with other settings or samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nemo_upcycle.data.skipped_samples import SkippedSamples
from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.pipeline.markers import SETTING, changed_inputs, describe_changes, refused_changes
from nemo_upcycle.pipeline.plan import Stage, WorkPlan
from nemo_upcycle.sources.checkpoints import complete_checkpoints, steps_in
from nemo_upcycle.trainers.earlier_branch import move_earlier
from nemo_upcycle.trainers.lineage import Branch, begin_branch, end_move, read_branches
from nemo_upcycle.trainers.settings import by_class, is_named, rewind_settings
from nemo_upcycle.utils.files import in_use, read_json


#: Options of the pipeline, as the user types them.
REWIND, SKIP = "--rewind", "--skip-steps"
#: The training that is rewound if the user names none.
_USUAL = "pretrain"
_RANGE = re.compile(r"(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class Rewind:
    """A request to rewind a training.

    Args:
        stage: name of the training's stage.
        step: number of steps in the checkpoint to continue from.
        skipped: pairs of the first and the last step whose samples are left out.
    """

    stage: str
    step: int
    skipped: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, rewind: str | None, skip_steps: str | None) -> Rewind | None:
        """Read the values of the options; None if the user gave none.

        Args:
            rewind: value of `--rewind`: `STEP`, or `STAGE:STEP`.
            skip_steps: value of `--skip-steps`: `FIRST:LAST` or `STEP`, or several of these with commas between them.

        Raises:
            UpcycleError: a value has another form, or `--rewind` is missing.

        Example:
            >>> Rewind.read("9000", "9400:9460,9502")
            Rewind(stage='pretrain', step=9000, skipped=((9400, 9460), (9502, 9502)))
        """
        if rewind is None:
            if skip_steps is not None:
                fix = f"add {REWIND} STEP, with the step of a kept checkpoint"
                raise UpcycleError(SKIP, kind="refused", got=f"needs {REWIND}", fix=fix)
            return None
        stage, _, step = rewind.rpartition(":")
        if not step.isdecimal() or not int(step):
            fix = f"write, for example, {REWIND} 9000"
            raise UpcycleError(REWIND, got=rewind, expected="STEP or STAGE:STEP, from 1 on", fix=fix)
        return cls(stage or _USUAL, int(step), tuple(_ranges(skip_steps, int(step))) if skip_steps else ())

    def branch(self, run_dir: Path, plan: WorkPlan) -> Branch | None:
        """Return the branch that the request starts; None if the run is already on this branch.

        Args:
            run_dir: the run's folder.
            plan: plan of the run with the new settings.

        Raises:
            UpcycleError: the stage cannot be rewound to the step, or a setting differs that a rewind cannot change.
        """
        stage = self._stage(plan)
        folder, inputs = stage.folder(run_dir, plan), stage.inputs(run_dir, plan)
        before = folder.started_from()
        if before is None:
            raise UpcycleError(
                f"Stage '{stage.name}'",
                kind="state",
                got=f"has not started in {run_dir}, so it cannot be rewound",
                fix=f"omit {REWIND}",
            )
        present, prefix = read_branches(folder.path)[-1], f"{SETTING}{stage.name}."
        names = [name for name in changed_inputs(before, inputs) if name.startswith(prefix)]
        changes = {name.removeprefix(prefix): (before.get(name), inputs.get(name)) for name in names}
        if present.number > 1 and (present.step, present.skipped_steps) == (self.step, self.skipped):
            has_same = all(inputs.get(prefix + name) == now for name, (_, now) in present.changes.items())
            if not present.is_moved and has_same and changes.keys() <= present.changes.keys():
                return present  # complete the rewind, which was interrupted
            if present.is_moved and not refused_changes(before, inputs):
                return None
        require_moved(folder.path)
        self.checkpoint(folder.path)
        self._require_changeable(stage.name, plan.trainer, before, inputs)
        return Branch(
            number=present.number + 1,
            step=self.step,
            skipped_steps=self.skipped,
            skipped_samples=self._samples(folder.path, present, plan.training_settings(stage.name).steps).ranges,
            changes=changes,
            time=datetime.now().astimezone().isoformat(timespec="seconds"),
            is_moved=False,
        )

    def start(self, branch: Branch, run_dir: Path, plan: WorkPlan) -> None:
        """Start a branch: record it, move the earlier branch aside, and let the stage start from its settings.

        Args:
            branch: result of `branch`.
            run_dir: the run's folder.
            plan: plan of the run with the new settings.

        Raises:
            UpcycleError: another process uses the stage's folder.
        """
        stage = self._stage(plan)
        folder = stage.folder(run_dir, plan)
        with in_use(folder.path):
            begin_branch(folder.path, branch)
            move_earlier(folder.path)
            folder.start(stage.inputs(run_dir, plan), stage.free_of(plan), resumable=False)
            end_move(folder.path)

    def _stage(self, plan: WorkPlan) -> Stage:
        names = [stage.name for stage in plan.stages if plan.training_text(stage.name)]
        if self.stage not in names:
            raise UpcycleError.unknown(f"{REWIND}: training", self.stage, names)
        return plan.stage(self.stage)

    def checkpoint(self, folder: Path) -> Path:
        """Return the checkpoint to rewind to.

        Args:
            folder: folder of the training.

        Raises:
            UpcycleError: the checkpoint was not kept; the text names the nearest kept one.
        """
        kept = {steps_in(path): path for path in complete_checkpoints(folder / "checkpoints")}
        if self.step in kept:
            return kept[self.step]
        if not kept:
            raise UpcycleError(
                f"Folder {folder / 'checkpoints'}",
                kind="state",
                got="has no complete checkpoint to rewind to",
                fix=f"omit {REWIND}, which starts again from the dense checkpoint",
            )
        nearest = min(kept, key=lambda step: abs(step - self.step))
        stage = "" if self.stage == _USUAL else f"{self.stage}:"
        listed = ", ".join(map(str, kept))
        raise UpcycleError(
            f"{REWIND} {self.step}",
            kind="state",
            got=f"names no kept checkpoint of {folder}. Kept steps: {listed}",
            fix=f"use {REWIND} {stage}{nearest}, the nearest kept step",
        )

    def _require_changeable(
        self, stage: str, trainer: str, before: Mapping[str, str], inputs: Mapping[str, str]
    ) -> None:
        """Check that only settings differ that may change at a rewind."""
        changed, prefix, may = refused_changes(before, inputs), f"{SETTING}{stage}.", rewind_settings(trainer)
        paths = by_class({**before, **inputs})
        refused = [name for name in changed if not is_named(paths[name].removeprefix(prefix), may)]
        if refused:
            raise StageError(
                f"The inputs of stage '{stage}'",
                kind="changed",
                got=describe_changes(refused, before, inputs),
                expected="its work started",
                fix=f"restore them: {REWIND} can change rates, schedule, weight decay, clipping and balancing",
            )

    def _samples(self, folder: Path, present: Branch, steps: int) -> SkippedSamples:
        """Return all samples that the new branch leaves out."""
        skipped = SkippedSamples(present.skipped_samples)
        if not self.skipped:
            return skipped
        settings = read_json(folder / "training.json")
        batch, steps = settings["global_batch_size"], max(steps, settings["max_steps"])
        for first, last in reversed(self.skipped):  # from the last range on, so that earlier places stay
            if last > steps:
                raise UpcycleError(SKIP, got=last, expected=f"at most {steps}, the last step", fix="correct the step")
            skipped = skipped.without_places((first - 1) * batch, last * batch)
        return skipped


def require_moved(folder: Path) -> None:
    """Check that a training's last rewind was completed.

    Args:
        folder: folder of the training.

    Raises:
        UpcycleError: the rewind was interrupted.
    """
    branch = read_branches(folder)[-1]
    if not branch.is_moved:
        raise UpcycleError(
            f"The rewind of {folder}",
            kind="state",
            got=f"to step {branch.step} was interrupted",
            fix="run the command with which you rewound it again",
        )


def _ranges(text: str, rewound: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of `--skip-steps`, all after the step to which the training is rewound.

    Raises:
        UpcycleError: the text has another form, or a range is empty, overlaps another range or begins too early.
    """
    ended = rewound
    for word in text.split(","):
        found = _RANGE.fullmatch(word.strip())
        if not found:
            fix = f"write, for example, {SKIP} 9400:9460"
            raise UpcycleError(SKIP, got=text, expected="FIRST:LAST, STEP, or several with commas", fix=fix)
        first, last = int(found[1]), int(found[2] or found[1])
        if first <= ended or last < first:
            expected = f"increasing steps after {rewound}, to which the training is rewound"
            raise UpcycleError(SKIP, got=text, expected=expected, fix="correct the steps, or rewind further back")
        ended = last
        yield first, last
