"""`nemo-upcycle data` from texts to a folder that training opens, with the real engine in its own environment."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.utils.files import read_json
from tests.functional.tiny import write_parent
from tests.planted import questions
from tests.waiting import HANG_S, wait_until


pytestmark = pytest.mark.slow
_WORDS = [f"word{number}" for number in range(500)]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/capitals.jsonl, test: FOLDER/capitals.jsonl}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
"""
BLEND = """
sources:
  web: {train: ["web/*.jsonl.gz"], weight: 0.6, license: CC0, tokens: 100000}
  mine: {train: ["mine/*.txt"], validation: [watched.txt], heldout: [held.txt], weight: 0.3, on_hit: drop}
  questions: {reader: lm_eval, train: [capitals], weight: 0.1, options: {include_path: tasks}, trains: [capitals]}
hold_out: {validation: 0.05, heldout: 0.05}
seq_length: 16
decontaminate: [full]
tokenizer: parent
"""


def _text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(_WORDS, k=words))


def _planted() -> str:
    """Return a question of MMLU, in a text."""
    row = max(questions(), key=lambda row: len(row["question"]))
    return f"{_text(1, 200)} {row['question']} {_text(2, 200)}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blend of three sources, with everything in it that is removed."""
    folder = tmp_path_factory.mktemp("texts")
    write_parent(folder / "parent")
    for name in ("web", "mine", "tasks"):
        (folder / name).mkdir()
    for part in range(3):
        lines = [json.dumps({"id": f"{part}-{n}", "text": _text(1000 * part + n)}) for n in range(200)]
        lines[7:7] = ["{broken", json.dumps(["no object"]), json.dumps({"id": "none"}), lines[3]]
        (folder / f"web/{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "mine/planted.txt").write_text(_planted())
    (folder / "mine/again.txt").write_text(_text(9001))
    (folder / "mine/own.txt").write_text(_text(9002))
    (folder / "held.txt").write_text(_text(9001))  # held out, so the copy to train on goes
    (folder / "watched.txt").write_text(_text(9003))
    rows = [{"question": f"What is the capital of {word}?", "answer": f"{word} city"} for word in _WORDS[:50]]
    (folder / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks/capitals.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    (folder / "rivers.jsonl").write_text(
        json.dumps({"question": " ".join(_text(9002).split()[:20]), "answer": "none"})
    )
    for task in ("rivers", "lost"):  # the file of the other is not there
        (folder / f"tasks/{task}.yaml").write_text(TASK.replace("FOLDER", str(folder)).replace("capitals", task))
    (folder / "suite.yaml").write_text("{tasks: {rivers: [0], lost: [0]}, local: false, include_path: tasks}")
    (folder / "mine.yaml").write_text(BLEND.replace("tokenizer: parent", f"tokenizer: {folder / 'parent'}"))
    return folder


def _data(texts: Path, output: Path, *words: str, under: str = "") -> subprocess.Popen[str]:
    """Start the command, of a folder's blend or of a file, in a shell `under` which it runs."""
    blend = texts / "mine.yaml" if texts.is_dir() else texts
    command = [sys.executable, "-m", "nemo_upcycle.cli", "data", str(blend), str(output), *words]
    return subprocess.Popen(
        ["bash", "-c", f'{under} exec "$@"', "bash", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def _answer(texts: Path, output: Path, *words: str, under: str = "") -> tuple[int, str, str]:
    with _data(texts, output, *words, under=under) as process:
        said, errors = process.communicate(timeout=HANG_S)
    return process.returncode, said, errors


def _bytes(folder: Path) -> dict[str, str]:
    """Return the hash of every file that training or a reader of the folder opens."""
    files = [*folder.glob("tokens/*"), *folder.glob("tokenizer/*"), *folder.glob("*.json*")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _written(folder: Path) -> dict[Path, int]:
    """Return when each file of tokens was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("tokens/*")}


@pytest.fixture(scope="module")
def built(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "data"
    status, said, errors = _answer(texts, output)
    assert status == 0, errors
    assert "web:" in said
    assert f"3 documents, 24 bytes: broken JSON, first at {texts}/web/0.jsonl.gz:8" in said
    return output


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / "manifest.json")


def test_every_document_is_accounted_for(built: Path) -> None:
    sources = _manifest(built)["sources"]
    for source in sources.values():
        for step in source["steps"].values():
            assert step["in"] == step["kept"] + sum(step["removed"].values())
    assert sources["web"]["steps"]["read"]["in"] == 3 * 204
    assert sum(sources["web"]["steps"]["read"]["removed"].values()) == 3 * 3
    assert sources["web"]["steps"]["deduplicate"]["removed"] == {"duplicate": 3}
    assert sources["mine"]["steps"]["deduplicate"]["removed"] == {"duplicate": 1}
    assert sources["mine"]["steps"]["decontaminate"]["removed"] == {"dropped": 1}
    assert sources["questions"]["splits"]["train"]["documents"] > 40


def test_training_opens_the_folder(built: Path, texts: Path) -> None:
    blend = open_blend(built)
    blend.require_tokenizer_of(str(texts / "parent"))
    assert blend.shares == pytest.approx({"mine": 0.3, "questions": 0.1, "web": 0.6})
    assert len(blend.paths(16)["train"]) == 6
    ids = {identity for identity, _ in blend.heldout()}
    assert "mine/held.txt" in ids
    assert len(ids) > 10
    dataset = IndexedDataset(str(built / _manifest(built)["sources"]["mine"]["splits"]["train"]["prefixes"][0]))
    assert len(dataset) == 1  # own.txt
    assert dataset[0][-1] == _manifest(built)["tokenizer"]["eos_id"]


def test_the_planted_question_is_reported(built: Path) -> None:
    found = read_json(built / "contamination.json")["sets"]["mmlu"]
    assert found["documents"] == 1
    assert found["examples"][0]["where"].endswith("planted.txt:1")
    said = open_blend(built).contamination
    removed = f"; removed text with {found['items_hit']} items of mmlu (1 documents, {found['bytes']:,} bytes)"
    assert said.startswith(f"{removed}; what is left shares 8 words in a row with ")


def test_own_tasks_are_looked_for_and_one_without_data_ends_the_build_unless_it_is_named(
    texts: Path, tmp_path: Path
) -> None:
    words = [f"decontaminate=[{texts / 'suite.yaml'}]"]
    status, _, errors = _answer(texts, tmp_path / "data", *words)
    assert status == 2
    assert "data of lm-eval's task lost: got " in errors
    assert "or name the task in decontaminate_without, to train without looking for its questions" in errors
    status, _, errors = _answer(texts, tmp_path / "data", *words, "decontaminate_without=[lost]")
    assert status == 0, errors
    manifest = _manifest(tmp_path / "data")
    assert manifest["decontaminated_without"] == ["lost"]
    assert manifest["sources"]["mine"]["steps"]["decontaminate"]["removed"] == {"dropped": 1}
    assert read_json(tmp_path / "data/contamination.json")["without"] == ["lm-eval/lost"]
    assert open_blend(tmp_path / "data").contamination.endswith("; not looked for: lm-eval/lost")


def test_the_same_again_is_done_already_and_another_blend_is_refused(texts: Path, built: Path) -> None:
    before, written = _bytes(built), _written(built)
    assert _answer(texts, built)[0] == 0
    assert _bytes(built) == before
    assert _written(built) == written
    status, _, errors = _answer(texts, built, "seed=7")
    assert status == 2
    assert "got another blend's (seed differ), expected an empty folder, or this blend's" in errors
    assert _bytes(built) == before


def test_changed_files_are_said_and_built_again_when_asked_for(texts: Path, built: Path, tmp_path: Path) -> None:
    copy, added = shutil.copytree(built, tmp_path / "data"), texts / "mine/added.txt"
    before = _bytes(copy)
    added.write_text(_text(9004))
    try:
        status, said, errors = _answer(texts, copy, "--json")
        assert (status, json.loads(said)["changed_files"]) == (1, {"new": [str(added)]})
        assert "add --update to build it again" in errors
        assert _bytes(copy) == before
        status, _, errors = _answer(texts, copy, "--update")
        assert status == 0, errors
        assert str(added) in _manifest(copy)["sources"]["mine"]["files"]
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
    finally:
        added.unlink()
    counts = [_manifest(folder)["sources"]["mine"]["splits"]["train"]["documents"] for folder in (built, copy)]
    assert counts[1] == counts[0] + 1


@pytest.mark.full
def test_a_mistake_found_before_the_texts_are_read_can_be_corrected(texts: Path, tmp_path: Path) -> None:
    status, _, errors = _answer(texts, tmp_path / "data", "decontaminate=[fulls]")
    assert status == 2
    assert "evaluation suite 'fulls' does not exist. Did you mean 'full'?" in errors
    process = _data(texts, tmp_path / "data", "decontaminate=[demo]")
    with process:
        found = tmp_path / "data/build/ngrams.json"
        wait_until(lambda: found.exists() or process.poll() is not None)
        os.killpg(process.pid, signal.SIGKILL)
    status, _, errors = _answer(texts, tmp_path / "data")
    assert status == 0 or "decontaminate differ" in errors  # the engine may have begun


@pytest.mark.full
def test_a_disk_that_is_full_at_the_first_write_refuses_no_later_start(texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    status, _, errors = _answer(texts, output, under='ulimit -f 1; trap "" XFSZ;')
    assert status == 2
    assert "File too large" in errors
    status, said, errors = _answer(texts, output)
    assert status == 0, errors
    assert "web:" in said


@pytest.mark.full
def test_an_empty_source_is_refused_early_and_stays_in_its_folder(texts: Path, tmp_path: Path) -> None:
    blend = tmp_path / "mine.yaml"
    (tmp_path / "tiny.txt").write_text("few words")
    content = (texts / "mine.yaml").read_text().replace('["', f'["{texts}/').replace("[watched", f"[{texts}/watched")
    content = content.replace("[held.txt", f"[{texts}/held.txt").replace("path: tasks", f"path: {texts}/tasks")
    blend.write_text(content.replace("hold_out:", f"  tiny: {{train: [{tmp_path}/tiny.txt]}}\nhold_out:"))
    output = tmp_path / "data"
    status, _, errors = _answer(blend, output, "--workers", "1")
    assert status == 2
    got = "got at most 11 tokens to train on, in 1 of 1 documents, expected more than a sequence (16)"
    assert f"source tiny: {got}" in errors
    assert not list(output.glob("build/stats/*"))  # nothing was tokenised
    blend.write_text(content)
    status, _, errors = _answer(blend, output, "--workers", "1")
    assert status == 2
    assert "got another blend's (sources differ)" in errors


@pytest.mark.full
def test_a_source_that_is_lost_in_part_ends_the_build_until_it_may_be(texts: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": _text(n)}) + "\n" for n in range(2000))
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-50_000])
    half, output, words = (
        tmp_path / "half.jsonl.gz",
        tmp_path / "data",
        [f"tokenizer={texts / 'parent'}", "seq_length=16"],
    )
    status, _, errors = _answer(half, output, *words)
    assert status == 1
    assert "truncated compressed file" in errors
    assert not (output / "_SUCCESS.json").exists()
    status, _, errors = _answer(half, output, *words, "sources.texts.max_lost=0.6")
    assert status == 0, errors
    assert "warning: source texts: " in errors


def test_a_folder_of_an_earlier_version_is_named_and_a_damaged_one_is_not_called_done(
    texts: Path, built: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(built, tmp_path / "data")
    marker = read_json(copy / "_SUCCESS.json")
    marker["made_from"]["format"] = 1
    (copy / "_SUCCESS.json").write_text(json.dumps(marker))
    status, _, errors = _answer(texts, copy)
    assert status == 2
    assert "got 1, expected 2. Fix: an earlier version made it: remove it first" in errors
    shutil.rmtree(copy)
    shutil.copytree(built, copy)
    next(copy.glob("tokens/*.bin")).unlink()
    status, _, errors = _answer(texts, copy)
    assert status == 2
    assert "got no such file" in errors
    assert "delete it and run" in errors


@pytest.mark.full
def test_two_workers_and_kills_give_the_same_bytes(texts: Path, built: Path, tmp_path: Path) -> None:
    for wait_s in (1.5, 4.0, 6.0, 8.0):
        with _data(texts, tmp_path / "data", "--workers", "2") as process:
            time.sleep(wait_s)
            os.killpg(process.pid, signal.SIGKILL)
    status, _, errors = _answer(texts, tmp_path / "data", "--workers", "2")
    assert status == 0, errors
    assert _bytes(tmp_path / "data") == _bytes(built)


@pytest.mark.full
def test_ctrl_c_stops_and_says_how_to_go_on(texts: Path, tmp_path: Path) -> None:
    with _data(texts, tmp_path / "data") as process:
        wait_until((tmp_path / "data/build/plan.json").exists, process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert "run again to resume" in errors
    assert not (tmp_path / "data/_SUCCESS.json").exists()


def test_check_reads_and_writes_nothing(texts: Path, tmp_path: Path) -> None:
    status, said, errors = _answer(texts, tmp_path / "data", "--check")
    assert status == 0, errors
    assert "web: 60.0%, files 3 train" in said
    assert "web: 60.0% of a run, about " in said
    assert "trains capitals" in said
    assert not (tmp_path / "data").exists()
