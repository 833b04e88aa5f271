"""Reduce the published CRDs of Kubeflow's training jobs to the parts that tests read (tests/crds/NAME.json).

    .venv/bin/python scripts/crd_schemas.py CLONE_OF_KUBEFLOW_TRAINER

The clone needs the release tags. It also contains the training operator's branch (v1.9). Descriptions, printer columns
and the generator's notes are omitted. Types, required fields, CEL rules and defaults stay. The originals are Copyright
The Kubeflow Authors, Apache-2.0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


#: name of the result -> release tag and file
PUBLISHED = {
    "trainjob-2.2": ("v2.2.1", "manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml"),
    "trainjob-2.3": ("v2.3.0", "manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml"),
    "pytorchjob-1.9": ("v1.9.4", "manifests/base/crds/kubeflow.org_pytorchjobs.yaml"),
}
TARGET = Path(__file__).parents[1] / "tests" / "crds"


def reduced(value: Any, *, is_properties: bool = False) -> Any:
    """Return a schema without its descriptions; keep a property that is itself named `description`."""
    if isinstance(value, list):
        return [reduced(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: reduced(inner, is_properties=key == "properties" and not is_properties)
        for key, inner in value.items()
        if is_properties or key not in ("description", "additionalPrinterColumns")
    }


def main(clone: str) -> None:
    """Write one file per CRD."""
    TARGET.mkdir(exist_ok=True)
    for name, (tag, path) in PUBLISHED.items():
        text = subprocess.run(["git", "-C", clone, "show", f"{tag}:{path}"], capture_output=True, check=True).stdout
        crd = yaml.safe_load(text)
        crd["metadata"] = {"name": crd["metadata"]["name"]}
        crd.pop("status", None)
        about = {
            "source": f"https://github.com/kubeflow/trainer, {tag}, {path}; reduced by scripts/crd_schemas.py",
            "license": "Apache-2.0, Copyright The Kubeflow Authors",
        }
        line = json.dumps({**about, "crd": reduced(crd)}, separators=(",", ":"))
        (TARGET / f"{name}.json").write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
