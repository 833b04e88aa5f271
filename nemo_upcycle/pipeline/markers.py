"""The marker that a finished stage leaves, by which the next run knows whether to run the stage again.

A stage's marker, `<run>/<stage>/_SUCCESS.json`, holds the hashes of everything the stage depends on: its settings and
the markers of the stages before it. A change upstream changes these hashes, and the stage runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.utils.files import MARKER, read_json, sha256_file, write_json


_STARTED = "_STARTED.json"
#: How a stage that is not done ended, in one word, for the shell of a batch job: it stopped and can go on, or it
#: failed for a reason that a new start would meet again. A stage that was killed writes neither.
ENDED = "_ENDED"
STOPPED, FAILED = "stopped", "failed"
_DELETE_MARKER = "delete it: the stage then runs again"


def setting_hashes(settings: dict[str, Any]) -> dict[str, str]:
    """Return the sha256 of each of a stage's own settings, which are plain values, as its marker names them."""
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in sorted(settings.items())}
    return {f"setting {name}": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def changed_inputs(before: Mapping[str, str], inputs: Mapping[str, str]) -> list[str]:
    """Return the names of the inputs whose hashes are others than before.

    Example:
        >>> changed_inputs({"setting dense": "a", "stage import": "b"}, {"setting dense": "c", "stage import": "b"})
        ['setting dense']
    """
    return [name for name, digest in sorted(inputs.items()) if before.get(name) != digest]


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
        """Return the hashes of the stage's settings and of the markers of the stages before it, which are done."""
        markers = {before: StageFolder(self.run_dir, before).marker for before in self.after}
        return setting_hashes(settings) | {f"stage {before}": sha256_file(path) for before, path in markers.items()}

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
        fix = f"delete it if the settings are those the work was started from, else {self.path}, to lose that work"
        started = self.path / _STARTED
        return _notes(started, fix) if started.is_file() else None

    def require_same(self, inputs: dict[str, str]) -> None:
        """Check that the folder holds no work that was started from other inputs.

        Args:
            inputs: what `inputs()` gave, or a part of it.

        Raises:
            StageError: it was started from others.
        """
        before = self.started_from()
        if changed := changed_inputs(inputs if before is None else before, inputs):
            raise StageError(
                f"{self.path}",
                got=f"work started from other inputs (changed: {', '.join(changed)})",
                expected="the inputs it was started from, or an empty folder",
                fix=f"set them back, choose another dir, or delete {self.path} to lose that work",
            )

    def start(self, inputs: dict[str, str], *, resumable: bool) -> None:
        """Record what the stage is started from, and delete its old marker.

        Args:
            inputs: what `inputs()` gave.
            resumable: whether a new start continues the folder's work, which requires the same inputs.

        Raises:
            StageError: a resumable stage was started from other inputs.
        """
        if resumable:
            self.require_same(inputs)
        self.marker.unlink(missing_ok=True)
        (self.path / ENDED).unlink(missing_ok=True)
        write_json(self.path / _STARTED, inputs)

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


def _notes(path: Path, fix: str) -> dict[str, Any]:
    """Read a stage's JSON file; name the `fix` if it is damaged, since nobody can write it again by hand."""
    try:
        notes = read_json(path)
    except UpcycleError:
        notes = None
    if not isinstance(notes, dict):
        raise StageError(str(path), got="a damaged file", expected="what the stage noted", fix=fix)
    return notes
