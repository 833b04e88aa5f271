"""`nemo-upcycle data` turns texts into a folder that training opens, with the real engine in its own environment."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_upcycle.cli.main import main
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.data.suites.items import suite_items
from nemo_upcycle.data.suites.suite_config import read_suite_config
from nemo_upcycle.utils.files import read_json
from tests.functional.tiny import write_parent
from tests.lm_eval_tasks import write_task
from tests.waiting import HANG_S


pytestmark = [pytest.mark.slow, pytest.mark.full]
_WORDS = [f"word{number}" for number in range(500)]
#: Three sources with every kind of text that is removed. The questions of one of the user's own tasks are missing.
BLEND = """
sources:
  web: {train: ["web/*.jsonl.gz"], weight: 0.6, license: CC0, tokens: 100000}
  mine: {train: ["mine/*.txt"], validation: [watched.txt], heldout: [held.txt], weight: 0.3, on_hit: drop}
  questions: {reader: lm_eval, train: [capitals], weight: 0.1, options: {include_path: tasks}, trains: [capitals]}
hold_out: {validation: 0.05, heldout: 0.05}
seq_length: 16
decontaminate: [demo, suite.yaml]
decontaminate_without: [lost]
tokenizer: parent
"""
SMALL = """
sources:
  mine: {train: ["small/*.txt"], validation: [watched.txt], trains: [capitals]}
seq_length: 16
tokenizer: parent
"""


def _text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(_WORDS, k=words))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts of both blends, and the tasks of a suite; the file of one task, `lost`, is missing."""
    folder = tmp_path_factory.mktemp("texts")
    write_parent(folder / "parent")
    for name in ("web", "mine", "small", "tasks"):
        (folder / name).mkdir()
    for part in range(3):
        lines = [json.dumps({"id": f"{part}-{n}", "text": _text(1000 * part + n)}) for n in range(200)]
        lines[7:7] = ["{broken", json.dumps(["no object"]), json.dumps({"id": "none"}), lines[3]]
        (folder / f"web/{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    question = max((item.renderings[0] for item in suite_items(read_suite_config("demo"))), key=len)
    (folder / "mine/planted.txt").write_text(f"{_text(1, 200)} {question} {_text(2, 200)}")
    (folder / "mine/rivers.txt").write_text(_text(9005))
    (folder / "mine/again.txt").write_text(_text(9001))
    (folder / "mine/own.txt").write_text(_text(9002))
    (folder / "small/own.txt").write_text(_text(9002))
    (folder / "held.txt").write_text(_text(9001))  # held out, so the copy in the training texts is removed
    (folder / "watched.txt").write_text(_text(9003))
    form = {"output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:"}
    form |= {"doc_to_target": "{{answer}}"}
    capitals = [{"question": f"What is the capital of {word}?", "answer": f"{word} city"} for word in _WORDS[:50]]
    write_task(folder / "tasks", "capitals", {"train": capitals, "test": capitals}, **form)
    rivers = [{"question": " ".join(_text(9005).split()[:20]), "answer": "none"}]
    for task, rows in (("rivers", rivers), ("lost", [])):
        write_task(folder / "tasks", task, {"test": rows}, **form)
    (folder / "suite.yaml").write_text("{tasks: {rivers: [0], lost: [0]}, local: false, include_path: tasks}")
    for name, blend in (("mine", BLEND), ("small", SMALL)):
        blend = blend.replace("tokenizer: parent", f"tokenizer: {folder / 'parent'}")
        (folder / f"{name}.yaml").write_text(blend.replace("suite.yaml", str(folder / "suite.yaml")))
    return folder


def _bytes(folder: Path) -> dict[str, str]:
    """Return the hash of every file that training or a reader of the folder opens."""
    files = [*folder.glob("tokens/*"), *folder.glob("tokenizer/*"), *folder.glob("*.json*")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def built(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the blend with three sources."""
    output = tmp_path_factory.mktemp("built") / "data"
    with redirect_stdout(io.StringIO()) as said:
        assert main(["data", str(texts / "mine.yaml"), str(output)]) == 0
    assert "web:" in said.getvalue()
    assert f"3 documents, 24 bytes: broken JSON, first at {texts}/web/0.jsonl.gz:8" in said.getvalue()
    return output


@pytest.fixture(scope="module")
def small(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small blend; a test that changes the folder must copy it.

    Before the build, another blend was started in this folder, and stopped before it read a text.
    """
    output = tmp_path_factory.mktemp("small") / "data"
    (output / "build").mkdir(parents=True)
    for name in ("made_from.json", "ngrams.json"):
        (output / "build" / name).write_text("{}")
    assert main(["data", str(texts / "small.yaml"), str(output)]) == 0
    assert not (output / "build/ngrams.json").exists()
    return output


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / "manifest.json")


def test_training_opens_the_folder(built: Path, texts: Path) -> None:
    blend = open_blend(built)
    blend.require_tokenizer_of(str(texts / "parent"))
    assert blend.shares == pytest.approx({"mine": 0.3, "questions": 0.1, "web": 0.6})
    assert len(blend.paths(16)["train"]) == 6
    ids = {identity for identity, _ in blend.heldout()}
    assert "mine/held.txt" in ids
    assert len(ids) > 10
    dataset = IndexedDataset(str(built / _manifest(built)["sources"]["mine"]["splits"]["train"]["prefixes"][0]))
    assert len(dataset) == 1  # only own.txt is left
    assert dataset[0][-1] == _manifest(built)["tokenizer"]["eos_id"]


def test_contaminated_questions_are_reported(built: Path) -> None:
    contamination = read_json(built / "contamination.json")
    found = contamination["sets"]["mmlu"]
    assert (found["documents"], contamination["sets"]["lm-eval/rivers"]["documents"]) == (1, 1)
    assert found["examples"][0]["where"].endswith("planted.txt:1")
    assert _manifest(built)["decontaminated_without"] == ["lost"]
    said = open_blend(built).contamination
    assert f"removed text with {found['items_hit']} items of mmlu (1 documents, {found['bytes']:,} bytes)" in said
    assert said.endswith("; not searched for: lm-eval/lost")


def test_another_blend_in_the_same_folder_is_refused(
    texts: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(small, tmp_path / "data")
    command = ["data", str(texts / "small.yaml"), str(copy)]
    assert main(command) == 0
    assert main([*command, "seed=7"]) == 2
    assert "holds another blend (seed differ)" in capsys.readouterr().err
    assert _bytes(copy) == _bytes(small)
    next(copy.glob("tokens/*.bin")).unlink()
    assert main(command) == 2
    assert ".bin does not exist. " in capsys.readouterr().err


def test_changed_files_are_said_and_built_again_when_asked_for(
    texts: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, added = shutil.copytree(small, tmp_path / "data"), texts / "small/added.txt"
    command = ["data", str(texts / "small.yaml"), str(copy)]
    added.write_text(_text(9004))
    try:
        assert main([*command, "--json"]) == 1
        said = capsys.readouterr()
        assert json.loads(said.out)["changed_files"] == {"new": [str(added)]}
        assert "Add --update to build it again" in said.err
        assert _bytes(copy) == _bytes(small)
        assert main([*command, "--update"]) == 0
        assert str(added) in _manifest(copy)["sources"]["mine"]["files"]
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
    finally:
        added.unlink()
    counts = [_manifest(folder)["sources"]["mine"]["splits"]["train"]["documents"] for folder in (small, copy)]
    assert counts == [1, 2]


def test_check_reads_and_writes_nothing(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(texts / "small.yaml"), str(tmp_path / "data"), "--check"]) == 0
    said = capsys.readouterr().out
    assert "mine: 100.0%, files 1 train, 1 validation" in said
    assert "mine: 100.0% of a run, about " in said
    assert "trains capitals" in said
    assert not (tmp_path / "data").exists()


def test_a_full_disk_refuses_no_later_start(texts: Path, tmp_path: Path) -> None:
    command = ["data", str(texts / "small.yaml"), str(tmp_path / "data")]
    shell = ["bash", "-c", 'ulimit -f 1; trap "" XFSZ; exec "$@"', "bash", sys.executable, "-m", "nemo_upcycle.cli"]
    done = subprocess.run([*shell, *command], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert main(command) == 0
