"""A rank of a training stage under `ft_launcher` that can hang once, after its third step."""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path


def hang_after_third_step(run_dir: Path, once: Path) -> None:
    """Stop this process with SIGSTOP after the third step, and create the file `once` to prevent a second stop."""
    metrics = run_dir / "pretrain/metrics.jsonl"
    while True:
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        if any(json.loads(line)["step"] == 3 for line in lines if line.endswith("}")):
            once.touch()
            os.kill(os.getpid(), 19)
        time.sleep(0.01)


if __name__ == "__main__":
    run_dir, once = Path(sys.argv[1]), sys.argv[2] and Path(sys.argv[2])
    if once and not once.exists() and os.environ["RANK"] == "1":
        threading.Thread(target=hang_after_third_step, args=(run_dir, once), daemon=True).start()
    sys.argv = ["stage", "pretrain", str(run_dir)]
    runpy.run_module("nemo_upcycle.pipeline", run_name="__main__")
