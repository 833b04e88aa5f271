"""The branches of a training that was rewound: where each branch starts, and what differs from the branch before it.

The present branch is in the training's own folder, where every other part of the package looks for it. An earlier
branch is in `branches/NUMBER`: its metrics from the first step on, and its checkpoints after the step to which the
training was rewound. Nothing is deleted. `lineage.json` lists the branches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_upcycle.data.skipped_samples import SkippedSamples
from nemo_upcycle.utils.files import read_json, write_json
from nemo_upcycle.utils.schema import numbered, require_known


#: File that lists the branches, and folder of the earlier branches.
LINEAGE, BRANCHES = "lineage.json", "branches"


@dataclass(frozen=True)
class Branch:
    """A part of a training that begins at a checkpoint.

    Attributes:
        number: number of the branch, from 1 on. The first branch begins at step 0.
        step: number of steps in the checkpoint to which the training was rewound.
        skipped_steps: pairs of the first and the last step whose samples this branch leaves out, as numbered by the
            branch before it.
        skipped_samples: ranges of all samples that this branch leaves out; see `SkippedSamples`.
        changes: setting -> pair of its values before and in this branch; None if it was not set.
        time: when the training was rewound.
        is_moved: whether the files of the branch before it have been moved to their folder.
    """

    number: int = 1
    step: int = 0
    skipped_steps: tuple[tuple[int, int], ...] = ()
    skipped_samples: tuple[tuple[int, int], ...] = ()
    changes: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    time: str = ""
    is_moved: bool = True

    def describe(self) -> str:
        """Describe the start of the branch in one line.

        Example:
            >>> Branch(2, 9000, ((9400, 9460),), changes={"optim.config.lr": ("3e-5", "2e-5")}).describe()
            'branch 2, from step 9,000, without the samples of steps 9400:9460, optim.config.lr 3e-5 -> 2e-5'
        """
        said = [f"branch {self.number}", *([f"from step {self.step:,}"] if self.step else [])]
        if self.skipped_steps:
            ((first, last), *others) = self.skipped_steps
            steps = "step" if first == last and not others else "steps"
            said.append(f"without the samples of {steps} {ranges_text(self.skipped_steps)}")
        said += [f"{name} {before} -> {after}" for name, (before, after) in self.changes.items()]
        return ", ".join(said)


def ranges_text(ranges: Iterable[tuple[int, int]], between: str = ",") -> str:
    """Return ranges, such as ranges of steps as `--skip-steps` reads them.

    Example:
        >>> ranges_text([(9400, 9460), (9502, 9502)])
        '9400:9460,9502'
    """
    return between.join(f"{first}:{last}" if first != last else str(first) for first, last in ranges)


def read_branches(folder: Path) -> list[Branch]:
    """Return the branches of a training, the present one last; one branch if the training was never rewound.

    Args:
        folder: folder of the training.

    Raises:
        UpcycleError: `lineage.json` is damaged, or a newer release wrote it.
    """
    path = folder / LINEAGE
    if not path.is_file():
        return [Branch()]
    content = read_json(path)
    require_known(content, path)
    return [_branch(one) for one in content["branches"]]


def _branch(fields: dict[str, Any]) -> Branch:
    pairs = {name: tuple(map(tuple, fields[name])) for name in ("skipped_steps", "skipped_samples")}
    changes = {name: tuple(values) for name, values in fields["changes"].items()}
    return Branch(**fields | pairs | {"changes": changes})


def skipped_samples(folder: Path) -> SkippedSamples:
    """Return the samples that the present branch of a training leaves out."""
    return SkippedSamples(read_branches(folder)[-1].skipped_samples)


def has_new_rates(folder: Path) -> bool:
    """Return whether a branch of a training has changed settings, so that a checkpoint's rates may be outdated."""
    return any(branch.changes for branch in read_branches(folder))


def begin_branch(folder: Path, branch: Branch) -> None:
    """Record a new branch of a training, which `move_earlier` and `end_move` complete. A second call does nothing.

    Args:
        folder: folder of the training, which has a checkpoint with `branch.step` steps.
        branch: the new branch.
    """
    if (branches := read_branches(folder))[-1].number < branch.number:
        _write(folder, [*branches, branch])


def end_move(folder: Path) -> None:
    """Record that the earlier branch was moved."""
    *earlier, branch = read_branches(folder)
    _write(folder, [*earlier, replace(branch, is_moved=True)])


def _write(folder: Path, branches: list[Branch]) -> None:
    write_json(folder / LINEAGE, numbered({"branches": [asdict(branch) for branch in branches]}))
