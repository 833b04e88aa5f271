"""The marker of a finished stage, which tells the next run whether the stage has to run again.

A stage's marker, `<run>/<stage>/_SUCCESS.json`, records everything that the stage depends on. The marker contains the
stage's own settings. For each earlier stage whose results the stage reads, the marker contains a hash of the earlier
stage's settings (`stage NAME`) and a hash of the results (`content NAME`). If a stage runs again with the same
settings and the same result, the stages that read the result need not run again. Settings that change no result (how
often a training logs or saves, how many nodes it runs on) are not in the marker. A started run can resume with other
values of these settings, and the run records the change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.spec import without_defaults
from nemo_upcycle.trainers.lineage import read_branches
from nemo_upcycle.trainers.settings import by_class, free_settings, is_named
from nemo_upcycle.utils.files import CHANGES, ENDED, MARKER, STARTED, read_json, write_json
from nemo_upcycle.utils.nested import flat
from nemo_upcycle.utils.schema import numbered, require_known


#: Words in `ENDED`: the stage stopped and can resume, or it failed for a reason that would also stop a new start.
STOPPED, FAILED = "stopped", "failed"
#: Suffix of the setting that holds the number of steps of a training. In a started run, the number may grow.
STEPS = " steps"
#: Largest number of characters of a setting's text (a longer text is stored as its hash), and largest number of
#: changes that a message lists.
_SHORT, _LISTED = 200, 5
#: Pieces of a file that are hashed: their number, and the size of each (bytes).
_PIECES, _PIECE_BYTES = 16, 1 << 16
#: Settings that release 0.2 recorded although they changed no result. Old runs may name these settings; nothing reads
#: them now.
RETIRED = ("trained_on",)
#: Settings that change no result. Earlier releases recorded some of them with the settings that do.
_FREE = (*free_settings("nemo"), *free_settings("bridge"))
#: Prefixes of the names of inputs. An unknown hash is empty, and equals every other hash.
SETTING, STAGE, CONTENT = "setting ", "stage ", "content "


def setting_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a stage's own settings (plain values) as its marker stores them: short texts, and hashes of long texts.

    Example:
        >>> setting_texts({"dense": "/models/8b", "pretrain": {"optim": {"lr": 3e-5}}})
        {'setting dense': '/models/8b', 'setting pretrain.optim.lr': '3e-05'}
    """
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat(settings, ".")}
    return _plain({SETTING + name: text if len(text) <= _SHORT else sha256(text) for name, text in texts.items()})


def _plain(inputs: Mapping[str, str]) -> dict[str, str]:
    """Omit fields of a spec that have their default value, because writing out a default changes nothing."""
    parts = {name: name.rpartition(".")[::2] for name in inputs}
    return {
        name: text
        for name, text in inputs.items()
        if not parts[name][0].endswith(".spec") or without_defaults({parts[name][1]: text})
    }


def sha256(text: str) -> str:
    """Return the hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(files: Iterable[Path]) -> str:
    """Hash files by name, size, and pieces spread over each file, so that different contents get different hashes.

    Different weights differ everywhere, so pieces are enough. Hashing a checkpoint of hundreds of GiB takes seconds.

    Args:
        files: files in their order; the hash includes the name of each file, but not the name of its folder.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        last = max(0, size - _PIECE_BYTES)
        with path.open("rb") as handle:
            for start in sorted({last * number // (_PIECES - 1) for number in range(_PIECES)}):
                handle.seek(start)
                digest.update(handle.read(_PIECE_BYTES))
    return digest.hexdigest()


def settings_hash(inputs: Mapping[str, str]) -> str:
    """Hash a stage's own settings. Stages that read the result identify the settings by this hash."""
    return sha256(json.dumps(sorted(item for item in inputs.items() if item[0].startswith(SETTING))))


def changed_inputs(before: Mapping[str, str], inputs: Mapping[str, str]) -> list[str]:
    """Return the names of the inputs that were changed, added or removed.

    The result of an earlier stage is compared only if its hash is known both before and now.

    Example:
        >>> changed_inputs({"setting dense": "a", "stage import": "b"}, {"setting dense": "c", "stage import": ""})
        ['setting dense']
    """

    def differs(name: str) -> bool:
        was, now = before.get(name), inputs.get(name)
        if "" in (was, now) and not name.startswith(SETTING):
            return False
        return was != now and not (name.startswith(CONTENT) and None in (was, now))

    return sorted(name for name in {*before, *inputs} if differs(name))


def refused_changes(before: Mapping[str, str], inputs: Mapping[str, str]) -> list[str]:
    """Return the names of changed inputs that do not allow a resume: all except a larger number of steps."""
    return [
        name
        for name in changed_inputs(before, inputs)
        if not (name.endswith(STEPS) and int(inputs.get(name, 0)) >= int(before.get(name, 0)))
    ]


def describe_changes(names: Sequence[str], before: Mapping[str, str], inputs: Mapping[str, str]) -> str:
    """Describe the changed inputs for people: settings with both values, stages by name.

    Example:
        >>> before, now = {"setting dense": "a", "stage x": "b"}, {"setting dense": "c", "stage y": "b"}
        >>> describe_changes(["setting dense", "stage x", "stage y"], before, now)
        'dense was a, is c; it read stage x; it reads stage y now'
    """
    changes = []
    for name in names[:_LISTED]:
        kind, _, plain = name.partition(" ")
        was, now = before.get(name, "not set"), inputs.get(name, "not set")
        if f"{kind} " == SETTING:
            changes.append(f"{plain} was {was}, is {now}")
        elif f"{kind} " == CONTENT:
            changes.append(f"stage {plain} left something else")
        elif name not in inputs:
            changes.append(f"it read {name}")
        else:
            changes.append(f"{name} has other settings" if name in before else f"it reads {name} now")
    return "; ".join(changes) + (f"; and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage of a run.

    Args:
        run_dir: the run's folder.
        name: name of the stage.
        reads: names of the stages whose results the stage reads, directly or not.
    """

    run_dir: Path
    name: str
    reads: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Path of the folder."""
        return self.run_dir / self.name

    @property
    def marker(self) -> Path:
        """Path of the success marker."""
        return self.path / MARKER

    def inputs(self, settings: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """List the inputs of the stage.

        Args:
            settings: `setting_texts` of the stage itself and of each stage that it reads, by the stage's name.
        """
        inputs = dict(settings[self.name])
        if branches := read_branches(self.path)[1:]:
            inputs[f"{SETTING}{self.name} branches"] = "; ".join(branch.describe() for branch in branches)
        for before in self.reads:
            folder = StageFolder(self.run_dir, before)
            inputs[STAGE + before] = folder.settings_hash(settings[before])
            if content := folder.content:
                inputs[CONTENT + before] = content
        return inputs

    def settings_hash(self, settings: Mapping[str, str]) -> str:
        """Hash the stage's settings as the release did that finished the stage, if the settings are still the same."""
        recorded = read_json(self.marker)["inputs"] if self._done() else {}
        own = {name: text for name, text in (self.done_from() or {}).items() if name.startswith(SETTING)}
        return settings_hash(recorded if own == settings else settings)

    @property
    def content(self) -> str:
        """Hash of the stage's results, from its marker; empty if the stage is not done or its marker has no hash."""
        return str((self._done() or {}).get("content", ""))

    def is_done(self, inputs: Mapping[str, str]) -> bool:
        """Return whether the stage finished earlier from the same inputs."""
        done = self.done_from()
        return done is not None and not changed_inputs(done, inputs)

    def done_from(self) -> dict[str, str] | None:
        """Return the inputs of the finished stage; None if the stage has not finished or its marker is damaged."""
        return (self._done() or {}).get("inputs")

    def started_from(self) -> dict[str, str] | None:
        """Return the inputs of the stage's last start; None if the stage never started.

        Raises:
            StageError: the note of the start is damaged.
        """
        return (self._started() or {}).get("inputs")

    def _done(self) -> dict[str, Any] | None:
        return self._notes(self.marker, "inputs", "outputs")

    def _started(self) -> dict[str, Any] | None:
        started = self.path / STARTED
        notes = self._notes(started, "inputs")
        if notes is None and started.is_file():
            raise StageError(
                str(started),
                kind="state",
                got="is damaged",
                fix=(
                    "delete it if the settings are the ones that the work started from; otherwise delete "
                    f"{self.path}, and the work is lost"
                ),
            )
        return notes

    def _notes(self, path: Path, *keys: str) -> dict[str, Any] | None:
        """Return the content of a stage's JSON file; None if the file is missing or damaged.

        Raises:
            UpcycleError: a newer release wrote the file.
        """
        try:
            notes = read_json(path)
        except UpcycleError:
            return None
        if not isinstance(notes, dict) or any(not isinstance(notes.get(key), dict) for key in keys):
            return None
        require_known(notes, path)
        paths = by_class(notes["inputs"])
        inputs = {
            name: text
            for name, text in notes["inputs"].items()
            if name.removeprefix(SETTING) not in RETIRED and not is_named(paths[name].partition(".")[2], _FREE)
        }
        return notes | {"inputs": _plain(inputs)}

    def refusal(self, inputs: Mapping[str, str]) -> str:
        """Return why the folder's started work may not resume with these inputs; empty if the work may resume.

        Raises:
            StageError: the note of the work's start is damaged.
        """
        before = self.started_from() or inputs
        return describe_changes(refused_changes(before, inputs), before, inputs)

    def start(self, inputs: Mapping[str, str], free: Mapping[str, str] | None = None, *, resumable: bool) -> list[str]:
        """Record the inputs that the stage starts from, and delete its old marker.

        Args:
            inputs: result of `inputs()`.
            free: `setting_texts` of the settings that do not change the result; they may differ at a new start.
            resumable: whether a new start resumes the folder's work, which requires the same inputs.

        Returns:
            Changes since the last start of the resumed work, for people; they are also written to `CHANGES`.

        Raises:
            StageError: a resumable stage was started from other inputs.
        """
        changes = []
        if resumable:
            require_same({self: inputs})
            changes = self._note_changes(inputs, free or {})
        self.marker.unlink(missing_ok=True)
        (self.path / ENDED).unlink(missing_ok=True)
        write_json(self.path / STARTED, numbered({"inputs": dict(inputs), "free": dict(free or {})}))
        return changes

    def _note_changes(self, inputs: Mapping[str, str], free: Mapping[str, str]) -> list[str]:
        """Write the changes since the last start to `CHANGES`, and return them for people."""
        started = self._started()
        if started is None:
            return []
        before, now = started["inputs"] | started.get("free", {}), {**inputs, **free}
        names = [name for name in changed_inputs(before, now) if name.startswith(SETTING)]
        with (self.path / CHANGES).open("a", encoding="utf-8") as file:
            for name in names:
                when = datetime.now().astimezone().isoformat(timespec="seconds")
                change = {"time": when, "setting": name.removeprefix(SETTING)}
                file.write(json.dumps(change | {"before": before.get(name), "after": now.get(name)}) + "\n")
        return [describe_changes([name], before, now) for name in names]

    def finish(self, inputs: Mapping[str, str], seconds: float, outputs: dict[str, Any], content: str = "") -> None:
        """Write the success marker.

        Args:
            inputs: result of `inputs()`.
            seconds: wall time of the stage.
            outputs: values that the stage reports.
            content: hash of the stage's results for other stages; empty if no stage reads the results.
        """
        made = {"stage": self.name, "inputs": dict(inputs), "content": content, "seconds": round(seconds, 1)}
        write_json(self.marker, numbered(made | {"outputs": outputs}))

    def ended(self, how: str) -> None:
        """Record how the stage ended without a result: `STOPPED` or `FAILED`."""
        (self.path / ENDED).write_text(f"{how}\n", encoding="utf-8")

    def outputs(self) -> dict[str, Any]:
        """Read the values that a finished stage reported.

        Raises:
            StageError: the stage is not finished, or its marker is damaged.
        """
        done = self._done()
        if done is None:
            got = "is damaged" if self.marker.is_file() else "does not exist"
            fix = "run the pipeline again with the same dir, which checks the stage again"
            raise StageError(str(self.marker), kind="state", got=got, fix=fix)
        outputs: dict[str, Any] = done["outputs"]
        return outputs


def require_same(folders: Mapping[StageFolder, Mapping[str, str]]) -> None:
    """Check that no folder holds work that was started from other inputs. More steps are allowed.

    Args:
        folders: inputs with which each stage would resume its work, by the stage's folder.

    Raises:
        StageError: a folder has work that was started from other inputs. The text names all such folders, because
            giving up the work of one folder loses the work of the others as well.
    """
    refusals = {folder: text for folder, inputs in folders.items() if (text := folder.refusal(inputs))}
    if refusals:
        first, *others = (str(folder.path) for folder in refusals)
        both = f" and {', '.join(others)}" if others else ""
        raise StageError(
            f"The inputs of {first}",
            kind="changed",
            got=f"{next(iter(refusals.values()))}",
            expected="its work started",
            fix=f"restore the inputs, choose another dir, or delete {first}{both}, which loses the work",
        )
