"""The demo's chain, shrunk, runs without a network, from the files that `nemo-upcycle fetch` has downloaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import MARKER, read_json
from tests.functional.stages import STAGES
from tests.functional.started import STAGE, environment
from tests.functional.tiny import texts, write_plan
from tests.model_hub import COMMIT, ModelHub, serving
from tests.no_network import can_leave


pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not can_leave(), reason="this kernel lets no user leave the network"),
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunPlan]:
    """The plan of a tiny run; a local server stands in for the hub with the parent and the site with the texts."""
    folder = tmp_path_factory.mktemp("site")
    local = write_plan(folder)
    shutil.move(folder / "parent", folder / "hub/acme/tiny")
    (folder / "hub/acme/texts").mkdir()
    with serving(folder / "hub") as endpoint:
        lines = ["sources:", "  words:", "    license: CC0"]
        for split, documents in texts().items():
            path = folder / f"hub/acme/texts/{split}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
            lines.append(f"    {split}: [{endpoint}/acme/texts/resolve/{COMMIT}/{split}.jsonl]")
        (folder / "blend.yaml").write_text("\n".join(lines) + "\n")
        yield replace(local, dense="hf://acme/tiny", data=str(folder / "blend.yaml"))


def _stage(name: str, run_dir: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a stage in a namespace without a network."""
    command = [sys.executable, "-m", "tests.no_network", *STAGE, name, str(run_dir)]
    own = environment() | variables | {"GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False)


def test_the_chain_runs_without_a_network_after_a_fetch(plan: RunPlan, tmp_path: Path) -> None:
    endpoint = Path(plan.data).read_text().partition("[")[2].partition("/acme")[0]
    run_dir = tmp_path / "run"
    plan.write(run_dir)
    done = _stage("import", run_dir, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint})
    assert done.returncode == 2, done.stderr
    assert "Download of acme/tiny from the Hugging Face hub failed" in done.stderr
    command = [sys.executable, "-m", "nemo_upcycle.cli", "fetch", str(tmp_path / "here"), "--for", str(run_dir)]
    own = os.environ | {"HF_ENDPOINT": endpoint}
    fetched = subprocess.run([*command, "--json"], env=own, capture_output=True, text=True, check=False)
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    there = (tmp_path / "here").rename(tmp_path / "there")  # as if carried to another machine
    variables = {
        name: value.replace(str(tmp_path / "here"), str(there))
        for name, value in json.loads(fetched.stdout)["variables"].items()
    }
    asked = len(ModelHub.asked)
    for name in STAGES:
        done = _stage(name, run_dir, variables)
        assert done.returncode == 0, done.stderr
        assert (run_dir / name / MARKER).is_file()
    assert len(ModelHub.asked) == asked
    assert Path(read_json(run_dir / "import" / MARKER)["outputs"]["dense_folder"]).is_relative_to(there)
    assert "heldout_perplexity" in (run_dir / "report.md").read_text()
