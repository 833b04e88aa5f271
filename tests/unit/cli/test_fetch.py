"""`nemo-upcycle fetch` downloads everything that a run needs into one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from nemo_upcycle.data.needs import Caches, note_fetched, task_need
from nemo_upcycle.utils.files import read_json, write_json
from tests.model_hub import COMMIT, TOKEN, ModelHub
from tests.unit.cli.conftest import refused
from tests.waiting import wait_until


class Site(NamedTuple):
    """A hub with a model and texts, and the user's own folder."""

    root: Path
    endpoint: str
    folder: Path

    def blend(self, license: str = "license: CC0") -> Path:
        """Write a blend of the hub's texts, and a suite beside the blend; return the blend's file."""
        entries = [f"{self.endpoint}/acme/texts/resolve/{COMMIT}/{name}.jsonl" for name in ("first", "second")]
        path = self.folder / "mine.yaml"
        path.write_text(f"sources:\n  web:\n    train: {json.dumps(entries)}\n    {license}\n")
        (self.folder / "suite.yaml").write_text("tasks: {heldout_perplexity: [0]}\nlocal: true\n")
        return path

    def command(self, *words: str) -> list[str]:
        """Return the command that fetches into `fetched`."""
        return [sys.executable, "-m", "nemo_upcycle.cli", "fetch", str(self.folder / "fetched"), *words]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of a user whose hub caches are not in the usual places."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.folder / "home"), "HF_HUB_CACHE": "/nowhere"}
        return os.environ | own | {"NO_PROXY": "127.0.0.1"}

    def fetch(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command in the user's folder."""
        words, variables = tuple(self.command(*words)), self.environment
        return subprocess.run(words, env=variables, cwd=self.folder, capture_output=True, text=True, check=False)


@pytest.fixture
def site(served: tuple[Path, str], tmp_path: Path) -> Site:
    return Site(*served, tmp_path)


def _inputs(site: Site, *license: str) -> tuple[str, ...]:
    return "dense=hf://acme/tiny", f"data={site.blend(*license)}", f"evaluation={site.folder / 'suite.yaml'}"


@pytest.mark.slow
@pytest.mark.full
def test_all_of_a_run_comes_into_the_folder(site: Site) -> None:
    done = site.fetch(*_inputs(site), "--json")
    assert done.returncode == 0, done.stderr
    answer, fetched = json.loads(done.stdout), site.folder / "fetched"
    assert answer["failed"] == {}
    assert answer["fetched"]["model acme/tiny"] == "the Hugging Face hub"
    assert list((fetched / "hf/hub/models--acme--tiny/snapshots").rglob("*.safetensors"))
    (text,) = (fetched / "texts").rglob("first.jsonl")
    assert text.read_bytes() == (site.root / "acme/texts/first.jsonl").read_bytes()
    assert not (site.folder / "home").exists()


@pytest.mark.slow
@pytest.mark.full
def test_a_stopped_fetch_continues(site: Site) -> None:
    words, fetched = _inputs(site), site.folder / "fetched"
    first, *_, last = sorted(path.name for path in (site.root / "acme/tiny").glob("*.safetensors"))
    ModelHub.held.add(last)
    try:
        process = subprocess.Popen(site.command(*words), env=site.environment, stderr=subprocess.DEVNULL)
        wait_until(lambda: list(fetched.rglob(first)), process)
        process.kill()
        process.wait()
    finally:
        ModelHub.held.clear()
    assert not list(fetched.rglob(last))
    kept = {path: path.stat().st_mtime_ns for path in fetched.rglob(first)}
    assert site.fetch(*words).returncode == 0
    assert list(fetched.rglob(last))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
@pytest.mark.full
def test_names_unavailable_inputs_and_fetches_the_rest(site: Site) -> None:
    dense, *others = _inputs(site, "weight: 1.0")
    done = site.fetch(dense.replace("tiny", "gated"), *others)
    assert done.returncode == 1, done.stderr
    assert "not fetched: model acme/gated (Download of acme/gated" in done.stdout
    assert "License of source web in blend mine is not stated" in done.stdout
    assert not (site.folder / "fetched/texts").exists()
    (site.folder / "home").mkdir()
    (site.folder / "home/token").write_text(TOKEN)
    done = site.fetch(dense.replace("tiny", "gated"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in (site.folder / "fetched").rglob("*") if path.is_file()]
    assert any(path.name == "tokenizer.json" for path in files)
    assert not any(TOKEN in path.read_text(errors="ignore") for path in files)


@pytest.mark.slow
@pytest.mark.full
def test_reads_fetched_data_sets_without_a_network(tmp_path: Path) -> None:
    hub = pytest.importorskip("tests.hub", reason="the stand-in for the hub's data sets is not there")
    pytest.importorskip("lm_eval")
    blend, flan = tmp_path / "mine.yaml", "hf://datasets/allenai/dolmino-mix-1124/data/flan/*.json*"
    blend.write_text(f"sources:\n  flan:\n    train: ['{flan}']\n    license: ODC-BY\n")
    (tmp_path / "suite.yaml").write_text("tasks: {piqa: [0], gsm8k: [5]}\nlocal: false\n")
    with hub.serving(hub.repositories()) as server:
        site = Site(tmp_path, server.endpoint, tmp_path)
        done = site.fetch(f"data={blend}", f"evaluation={tmp_path / 'suite.yaml'}", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import sys; from pathlib import Path; from nemo_upcycle.data.blend import read_blend\n"
        "from nemo_upcycle.data.inputs import list_inputs\n"
        "from nemo_upcycle.data.suites.lm_eval_tasks import load_tasks\n"
        "files = list_inputs(read_blend(sys.argv[1]), 'flan', Path())['train']\n"
        "tasks = load_tasks(['piqa', 'gsm8k'])\n"
        "print(len(files), all(Path(file.path).stat().st_size == file.size_bytes for file in files))\n"
        "print([len(list(tasks[name][0].eval_docs)) for name in tasks])\n"
    )
    there = (tmp_path / "fetched").rename(tmp_path / "there")
    variables = {"NEMO_UPCYCLE_CACHE": str(there), "HF_HOME": str(there / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(blend)]
    read = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert read.stdout.splitlines() == ["2 True", f"[{hub.ROWS}, {hub.ROWS}]"], read.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--for", "llama3_8b_e8t3"], "recipe 'llama3_8b_e8t3' does not exist."),
        (["--for", "runs/first"], "--for runs/first is neither the folder of a run nor a recipe."),
        (["dens=a/b"], "argument 'dens' does not exist."),
        ([], "Nothing to fetch was named."),
    ],
)
def test_a_mistake_is_told_before_anything_is_fetched(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert str(refused("fetch", str(tmp_path / "new"), *words)).startswith(said)
    assert not (tmp_path / "new").exists()


def test_names_of_tasks_are_noted_once_for_all(tmp_path: Path) -> None:
    need = task_need("piqa")
    assert not need.is_in(Caches(tmp_path, None))
    # Release 0.2 wrote this format.
    write_json(tmp_path / "fetched.json", {"fetched": {need.what: {"place": "a hub"}}, "files": {}})
    assert need.is_in(Caches(tmp_path, None))
    note_fetched(tmp_path, ["model a/b"])
    assert read_json(tmp_path / "fetched.json") == {"fetched": [need.what, "model a/b"]}
