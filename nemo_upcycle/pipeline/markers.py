"""The marker that a finished stage leaves, by which the next run knows whether to run the stage again.

A stage's marker, `<run>/<stage>/_SUCCESS.json`, holds everything the stage depends on: its settings, and the hashes of
the markers of the stages before it. A change upstream changes these hashes, and the stage runs again. What does not
change a result (how often a training logs or saves, on how many nodes it runs) is no part of it: a run that has
started resumes with other values, and notes the change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.utils.files import CHANGES, MARKER, read_json, sha256_file, write_json
from nemo_upcycle.utils.nested import flat


_STARTED = "_STARTED.json"
#: How a stage that is not done ended, in one word, for the shell of a batch job: it stopped and can resume, or it
#: failed for a reason that a new start would meet again. A stage that was killed writes neither.
ENDED = "_ENDED"
STOPPED, FAILED = "stopped", "failed"
_DELETE_MARKER = "delete it: the stage then runs again"
#: The name of a setting that holds how many steps a training takes ends so: in a started run it may grow.
STEPS = " steps"
#: A longer text of a setting is kept as its hash; of more changes the first ones are named.
_SHORT, _LISTED = 200, 5


def setting_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a stage's own settings, which are plain values, as its marker names them: short texts, or their hashes.

    Example:
        >>> setting_texts({"dense": "/models/8b", "pretrain": {"optim": {"lr": 3e-5}}})
        {'setting dense': '/models/8b', 'setting pretrain.optim.lr': '3e-05'}
    """
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat(settings, ".")}
    return {f"setting {name}": text if len(text) <= _SHORT else _sha256(text) for name, text in texts.items()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def changed_inputs(before: Mapping[str, str], inputs: Mapping[str, str]) -> list[str]:
    """Return the names of the inputs that were something else before, or are new, or gone.

    Example:
        >>> changed_inputs({"setting dense": "a", "stage import": "b"}, {"setting dense": "c", "stage import": "b"})
        ['setting dense']
    """
    return sorted(name for name in {*before, *inputs} if before.get(name) != inputs.get(name))


def refused_changes(before: Mapping[str, str], inputs: Mapping[str, str]) -> list[str]:
    """Return the names of the changed inputs with which started work may not resume: all but more steps."""
    return [
        name
        for name in changed_inputs(before, inputs)
        if not (name.endswith(STEPS) and int(inputs.get(name, 0)) >= int(before.get(name, 0)))
    ]


def describe_changes(names: Sequence[str], before: Mapping[str, str], inputs: Mapping[str, str]) -> str:
    """Return which inputs changed, for people: settings with both values, stages by name.

    Example:
        >>> before, now = {"setting dense": "a", "stage x": "b"}, {"setting dense": "c", "stage y": "b"}
        >>> describe_changes(["setting dense", "stage x", "stage y"], before, now)
        'dense was a, is c; it read stage x; it reads stage y now'
    """
    changes = []
    for name in names[:_LISTED]:
        kind, _, plain = name.partition(" ")
        was, now = before.get(name, "not set"), inputs.get(name, "not set")
        if kind == "setting":
            changes.append(f"{plain} was {was}, is {now}")
        elif name not in inputs:
            changes.append(f"it read {name}")
        else:
            changes.append(f"{name} ran again" if name in before else f"it reads {name} now")
    return "; ".join(changes) + (f"; and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage of a run.

    Args:
        run_dir: the run's folder.
        name: of the stage.
        after: names of the stages whose results it reads.
    """

    run_dir: Path
    name: str
    after: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder."""
        return self.run_dir / self.name

    @property
    def marker(self) -> Path:
        """The success marker."""
        return self.path / MARKER

    def inputs(self, settings: dict[str, Any]) -> dict[str, str]:
        """Return the stage's settings and the hashes of the markers of the stages before it, which are done."""
        markers = {before: StageFolder(self.run_dir, before).marker for before in self.after}
        return setting_texts(settings) | {f"stage {before}": sha256_file(path) for before, path in markers.items()}

    def is_done(self, inputs: dict[str, str]) -> bool:
        """Return whether the stage finished earlier, from the same inputs."""
        return self.done_from() == inputs

    def done_from(self) -> dict[str, str] | None:
        """Return the inputs that the stage finished from; None where it has not."""
        try:
            return _notes(self.marker, _DELETE_MARKER).get("inputs") if self.marker.is_file() else None
        except StageError:
            if self.marker.is_file():
                raise
            return None  # a job has started the stage again and removed it

    def started_from(self) -> dict[str, str] | None:
        """Return the inputs that the stage was last started from; None where it was not."""
        return (self._started() or {}).get("inputs")

    def _started(self) -> dict[str, Any] | None:
        fix = f"delete it if the settings are those the work was started from, else {self.path}, to lose that work"
        started = self.path / _STARTED
        return _notes(started, fix, "inputs") if started.is_file() else None

    def require_same(self, inputs: dict[str, str]) -> None:
        """Check that the folder holds no work that was started from other inputs; more steps are no others.

        Args:
            inputs: what `inputs()` gave, or `setting_texts`, which is a part of it: then of the stages before it only
                their names are compared, since they need not be done.

        Raises:
            StageError: it was started from others.
        """
        before = self.started_from()
        if before is None:
            return
        if not any(name.startswith("stage ") for name in inputs):
            before = {name: "" if name.startswith("stage ") else value for name, value in before.items()}
            inputs = inputs | {f"stage {name}": "" for name in self.after}
        if changed := refused_changes(before, inputs):
            raise StageError(
                f"{self.path}",
                got=f"work started from other inputs ({describe_changes(changed, before, inputs)})",
                expected="the inputs it was started from, since its result depends on them",
                fix=f"set them back, choose another dir, or delete {self.path} to lose that work",
            )

    def start(self, inputs: dict[str, str], free: Mapping[str, str] | None = None, *, resumable: bool) -> list[str]:
        """Record what the stage is started from, and delete its old marker.

        Args:
            inputs: what `inputs()` gave.
            free: `setting_texts` of what its result does not depend on, which may change at a new start.
            resumable: whether a new start continues the folder's work, which requires the same inputs.

        Returns:
            What changed since an earlier start of the work that is continued, for people; it is noted in `CHANGES`.

        Raises:
            StageError: a resumable stage was started from other inputs.
        """
        changes = []
        if resumable:
            self.require_same(inputs)
            changes = self._note_changes(inputs, free or {})
        self.marker.unlink(missing_ok=True)
        (self.path / ENDED).unlink(missing_ok=True)
        write_json(self.path / _STARTED, {"inputs": inputs, "free": free or {}})
        return changes

    def _note_changes(self, inputs: Mapping[str, str], free: Mapping[str, str]) -> list[str]:
        """Write what changed since the last start to `CHANGES`; return it for people."""
        started = self._started()
        if started is None:
            return []
        before, now = started["inputs"] | started.get("free", {}), {**inputs, **free}
        names = [name for name in changed_inputs(before, now) if not name.startswith("stage ")]
        with (self.path / CHANGES).open("a", encoding="utf-8") as file:
            for name in names:
                when = datetime.now().astimezone().isoformat(timespec="seconds")
                change = {"time": when, "setting": name.removeprefix("setting ")}
                file.write(json.dumps(change | {"before": before.get(name), "after": now.get(name)}) + "\n")
        return [describe_changes([name], before, now) for name in names]

    def finish(self, inputs: dict[str, str], seconds: float, outputs: dict[str, Any]) -> None:
        """Write the success marker."""
        write_json(
            self.marker, {"stage": self.name, "inputs": inputs, "seconds": round(seconds, 1), "outputs": outputs}
        )

    def ended(self, how: str) -> None:
        """Record how the stage ended without a result: `STOPPED` or `FAILED`."""
        (self.path / ENDED).write_text(f"{how}\n", encoding="utf-8")

    def outputs(self) -> dict[str, Any]:
        """Return what a finished stage reported."""
        return _notes(self.marker, _DELETE_MARKER)["outputs"]


def _notes(path: Path, fix: str, *keys: str) -> dict[str, Any]:
    """Read a stage's JSON file; name the `fix` if it is damaged, since nobody can write it again by hand."""
    try:
        notes = read_json(path)
    except UpcycleError:
        notes = None
    if not isinstance(notes, dict) or any(key not in notes for key in keys):
        raise StageError(str(path), got="a damaged file", expected="what the stage noted", fix=fix)
    return notes
