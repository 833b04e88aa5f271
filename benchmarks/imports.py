"""Run a command, and write the processor seconds of the command and of each package's import.

`benchmarks.answers` starts this program:

python -m benchmarks.imports imports.json nemo-upcycle --help
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any


def _write(output: Path, begin_s: float, imports: dict[str, float]) -> None:
    taken_s = sum(os.times()[:4]) - begin_s
    output.write_text(json.dumps({"seconds": taken_s, "imports": imports}), encoding="utf-8")


def main() -> None:
    """Run the command that follows the output file on the command line, in this process."""
    begin_s = time.process_time()
    output, program, *words = sys.argv[1:]
    bootstrap: Any = vars(importlib)["_bootstrap"]
    load, seconds, open_at = bootstrap._find_and_load, defaultdict[str, float](float), [0.0]

    def measured(name: str, import_: Any) -> Any:
        start_s = time.process_time()
        open_at.append(0.0)
        try:
            return load(name, import_)
        finally:
            taken_s = time.process_time() - start_s
            seconds[name.partition(".")[0]] += taken_s - open_at.pop()
            open_at[-1] += taken_s

    bootstrap._find_and_load = measured
    atexit.register(lambda: _write(Path(output), begin_s, seconds))
    sys.argv = [str(Path(sys.executable).with_name(program)), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
