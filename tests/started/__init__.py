"""A small run that each release finished, as data: every later release of the same major number goes on with it."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

from nemo_upcycle.pipeline.markers import settings_hash


#: By release: all that a run needs to go on, packed by `python -m tests.started`.
PACKED = {release: Path(__file__).with_name(f"{release}.tar.gz") for release in ("0.2.0", "0.3.0")}
#: Where the runs stood that were packed.
PLACE = "/started"
#: Stages of the chain, and the notes of each that name the stages before it by the hashes of their settings.
_STAGES = ("import", "data", "upcycle", "pretrain", "dense_ct", "export", "evaluate", "report")
_NOTES = ("_STARTED.json", "_SUCCESS.json")


def unpack(release: str, folder: Path) -> Path:
    """Unpack a run as if it had been started in `folder`; return the run's folder, beside what it was made from."""
    with tarfile.open(PACKED[release]) as tar:
        tar.extractall(folder, filter="data")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if PLACE in text:
            _write(path, text.replace(PLACE, str(folder)))
    run_dir = folder / "run"
    for path in (run_dir / stage / name for stage in _STAGES for name in _NOTES):  # paths are part of what is hashed
        notes = json.loads(path.read_text())
        for key in notes["inputs"]:
            if key.startswith("stage "):
                marker = json.loads((run_dir / key.removeprefix("stage ") / "_SUCCESS.json").read_text())
                notes["inputs"][key] = settings_hash(marker["inputs"])
        _write(path, json.dumps(notes, indent=2) + "\n")
    return run_dir


def _write(path: Path, text: str) -> None:
    """Replace a file's text, and keep its time."""
    written_ns = path.stat().st_mtime_ns
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(written_ns, written_ns))
