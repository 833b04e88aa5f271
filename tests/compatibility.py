"""Compare what a runtime does with a model with its row in `conf/compatibility`, and record it on request."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

from nemo_upcycle.models.compatibility import PROPERTIES, Row, Written, runtimes
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.wrapper import wrapper_of
from nemo_upcycle.utils.files import read_json


#: Variable with the name of a file to which results are appended, for `python -m benchmarks.compatibility`.
VARIABLE = "COMPATIBILITY"
_WORST = ("refused", "other", "option", "same", "not run")


def written(folder: Path, itemsize: int) -> Written:
    """Return the model of a folder."""
    wrapper = wrapper_of(read_json(folder / "config.json"))
    return Written(read_architecture(folder), itemsize, wrapper.hf_class if wrapper else "")


def _release(runtime: str) -> str:
    """Return the installed release of a runtime, or the table's release if the runtime is not installed."""
    (named,) = [one.release for one in runtimes() if one.name == runtime]
    package, _, _ = named.partition(" ")
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return named


def rows(runtime: str, model: Written) -> list[Row]:
    """Return the rows about a model; `runtime` is the name in the table."""
    (found,) = [one for one in runtimes() if one.name == runtime]
    return found.found(model)


def expected(runtime: str, model: Written) -> str:
    """Return the result that the table expects: the worst result in the rows about a model."""
    return min((row.result for row in rows(runtime, model)), key=_WORST.index)


def check(runtime: str, model: Written, result: str) -> None:
    """Record a result, or compare it with the table; "same" also matches a row that asks for an option."""
    if path := os.environ.get(VARIABLE):
        properties = [name for name, holds in PROPERTIES.items() if holds(model)]
        line = {"runtime": runtime, "hf_class": model.arch.hf_class, "where": properties, "result": result}
        line["release"] = _release(runtime)
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return
    wanted = expected(runtime, model)
    assert result == wanted or (result, wanted) == ("same", "option"), (model.arch.hf_class, rows(runtime, model))
