"""Move the files of a training's earlier branch aside, when the training is rewound."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_upcycle.online.receipt import read_receipt
from nemo_upcycle.sources.checkpoints import UNFINISHED, by_step, make_last, steps_in
from nemo_upcycle.trainers.lineage import BRANCHES, read_branches
from nemo_upcycle.trainers.metrics_file import METRICS, append_line, keep_until
from nemo_upcycle.utils.files import MARKER, STARTED, whole_file, write_json


RECEIPT = "receipt.json"
#: Files that describe a branch; copies of them are kept with the branch.
_DESCRIBES = (METRICS, "training.json", RECEIPT, STARTED, MARKER)


def move_earlier(folder: Path) -> None:
    """Move the checkpoints of the earlier branch aside, and cut the metrics at the step where the branches part.

    The function can be called again if it was interrupted.
    """
    *earlier, branch = read_branches(folder)
    aside = folder / BRANCHES / str(earlier[-1].number)
    (aside / "checkpoints").mkdir(parents=True, exist_ok=True)
    # Bridge's files `latest_*` name the last checkpoint of the branch.
    for path in (*(folder / name for name in _DESCRIBES), *(folder / "checkpoints").glob("latest_*")):
        kept = aside / path.relative_to(folder)
        if path.is_file() and not kept.is_file():
            with whole_file(kept) as copy:
                shutil.copyfile(path, copy)
    for checkpoint in by_step(folder / "checkpoints"):
        for path in (checkpoint, checkpoint.with_name(checkpoint.name + UNFINISHED)):
            if steps_in(checkpoint) > branch.step and path.exists():
                path.rename(aside / "checkpoints" / path.name)
    make_last(next(one for one in reversed(by_step(folder / "checkpoints")) if steps_in(one) == branch.step))
    keep_until(folder / METRICS, branch.step)
    append_line(folder / METRICS, {"step": branch.step, "branch": branch.number})
    for receipt in (folder / RECEIPT, folder / "checkpoints" / RECEIPT):
        if receipt.is_file():
            write_json(receipt, read_receipt(receipt) | {"branches": [one.describe() for one in (*earlier, branch)]})
