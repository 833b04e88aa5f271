"""Run every model class in each release and server that works here; write results to `conf/compatibility`.

    python -m benchmarks.compatibility            all runtimes
    python -m benchmarks.compatibility vllm       only the runtime of conf/compatibility/vllm.yaml

The command of a runtime installs it and runs small random models: `tests/loading` in transformers, `tests/servers` in
servers. A row whose models ran gets the result and today's date. Other rows stay as they are. The models of a row
without a date never ran here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_upcycle.models.compatibility import ANY, FOLDER, Row, Runtime, read_runtime
from nemo_upcycle.utils.conf import packaged, packaged_names
from nemo_upcycle.utils.writers import yaml_text
from tests.compatibility import VARIABLE


ROOT = Path(__file__).parents[1]


def measured(runtime: Runtime) -> list[dict[str, Any]]:
    """Run a runtime's command, and return a record for each model that ran."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.jsonl")
        subprocess.run(runtime.command, shell=True, cwd=ROOT, env=os.environ | {VARIABLE: str(path)}, check=False)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [record for line in lines if (record := json.loads(line))["runtime"] == runtime.name]


def updated(rows: Iterable[Row], records: list[dict[str, Any]], today: str) -> list[Row]:
    """Return the rows with the results of the models that ran, and a new row for each class without a row.

    A row with a property gets the result of the models with this property. A row without a property gets the result of
    the models that belong to no other row of the class.

    Args:
        rows: rows of the table.
        records: results, as `tests.compatibility.check` writes them.
        today: date of the results.
    """
    old = list(rows)
    new = {record["hf_class"] for record in records} - {row.hf_class for row in old}
    old += [Row(name, "not run") for name in sorted(new)]
    return [_updated(row, old, records, today) for row in old]


def _updated(row: Row, rows: list[Row], records: list[dict[str, Any]], today: str) -> Row:
    special = {one.where for one in rows if one.where and one.hf_class in (ANY, row.hf_class)}
    about = [record for record in records if row.hf_class in (ANY, record["hf_class"])]
    if row.where:
        about = [record for record in about if row.where in record["where"]]
    # Models with only this property come first. Another property of a model may explain the result.
    alone = [record for record in about if special.intersection(record["where"]) <= {row.where}]
    found = {record["result"] for record in (alone or (about if row.where else []))}
    if not found:
        return row
    if len(found) > 1:
        raise SystemExit(f"{row.hf_class} {row.where}: models of one row give several results: {sorted(found)}")
    result: Any = "option" if row.result == "option" and found == {"same"} else found.pop()
    return replace(row, result=result, date=today)


def write(path: Path, runtime: Runtime, rows: Iterable[Row]) -> None:
    """Write a file of the table."""
    head, _, _ = path.read_text(encoding="utf-8").partition("rows:")
    head = re.sub(r"^release: .*$", f"release: {runtime.release}", head, flags=re.MULTILINE)
    fields = [{name: value for name, value in vars(row).items() if value} for row in rows]
    path.write_text(head + yaml_text({"rows": fields}, width=300), encoding="utf-8")


def main() -> None:
    """Run the chosen runtimes, and print the rows that changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=packaged_names(FOLDER), metavar="NAME")
    for name in parser.parse_args().names:
        path, runtime = packaged(FOLDER) / f"{name}.yaml", read_runtime(name)
        records = measured(runtime)
        rows = updated(runtime.rows, records, datetime.date.today().isoformat())
        ran = {record["release"] for record in records} or {runtime.release}
        if len(ran) > 1:
            raise SystemExit(f"{runtime.name}: models ran in several releases: {', '.join(sorted(ran))}")
        for old, new in zip(runtime.rows, rows, strict=False):
            if old.result != new.result:
                print(f"{runtime.name}, {new.hf_class} {new.where}: {old.result} -> {new.result}")
        print(f"{runtime.name}: {sum(bool(row.date) for row in rows)} of {len(rows)} rows have run")
        write(path, replace(runtime, release=ran.pop()), rows)


if __name__ == "__main__":
    main()
