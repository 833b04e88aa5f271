"""A packed small run of each release. Every later release with the same major number must resume these runs."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

from nemo_upcycle.pipeline.markers import settings_hash


#: Release -> archive of all files that a run needs to resume. `python -m tests.started` packs an archive.
PACKED = {release: Path(__file__).with_name(f"{release}.tar.gz") for release in ("0.2.0", "0.3.0")}
#: Folder in which the packed runs were made.
PLACE = "/started"
#: Stages of the chain, and the files of a stage that contain hashes of the settings of earlier stages.
_STAGES = ("import", "data", "upcycle", "pretrain", "dense_ct", "export", "evaluate", "report")
_NOTES = ("_STARTED.json", "_SUCCESS.json")


def unpack(release: str, folder: Path) -> Path:
    """Unpack a run and its inputs as if the run had been started in `folder`; return the run's folder."""
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
    for path in (run_dir / stage / name for stage in _STAGES for name in _NOTES):  # the hashes depend on paths
        notes = json.loads(path.read_text())
        for key in notes["inputs"]:
            if key.startswith("stage "):
                marker = json.loads((run_dir / key.removeprefix("stage ") / "_SUCCESS.json").read_text())
                notes["inputs"][key] = settings_hash(marker["inputs"])
        _write(path, json.dumps(notes, indent=2) + "\n")
    return run_dir


def _write(path: Path, text: str) -> None:
    """Replace a file's text, and keep its modification time."""
    written_ns = path.stat().st_mtime_ns
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(written_ns, written_ns))
