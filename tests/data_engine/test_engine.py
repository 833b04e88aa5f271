"""The engine's command writes the same bytes, however it is run, interrupted or killed."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_upcycle.data.engine import clean, overlap
from nemo_upcycle.data.engine.tasks import load_plan
from nemo_upcycle.data.inputs import cut_between_lines
from nemo_upcycle.data.readers import InputFile
from tests.data_engine.blend import MINHASH, QUESTION, blend, sentence, write_index, write_jsonl, write_plan
from tests.data_engine.runs import clear, command, everything, execute, removed, run, stats, texts
from tests.near import EQUAL, NEAR
from tests.waiting import HANG_S, wait_until


def _every_stage(folder: Path) -> Path:
    """Write a plan with quotas whose tasks share texts, passages, near duplicates and evaluation items."""
    near = list(NEAR.values())
    tasks = []
    for task in range(4):
        many = [sentence(n) for n in range(10)]
        for n in range(20 * task, 20 * task + 40):
            shared = " ".join(f"{n % 60}w{m * 7 % 80}" for m in range(300))
            own = " ".join(f"{n}v{m}{task}" for m in range(900 if task % 2 else 100))
            many.append(f"{shared} {own} {QUESTION if n % 9 == task else ''}")
        for n in range(12):
            alike = " ".join(map(sentence, range(50 * n, 50 * n + 30)))
            many.append(near[(n + task) % len(near)](alike, random.Random(n)))
        file = write_jsonl(folder / "input" / f"{task}.jsonl", *many)
        for part in cut_between_lines(InputFile(file, "jsonl", Path(file).stat().st_size), 200_000):
            tasks.append({"files": [file], "split": None, "max_tokens": 150_000, "options": part.options})
    more = {"heldout_overlap": 0.5, "near_duplicates": MINHASH, "ngram_index": write_index(folder)}
    return write_plan(folder, tasks, hold_out={"validation": 0.1, "heldout": 0.1}, finders=2, **more)


def test_workers_and_kills_do_not_change_a_byte(tmp_path: Path) -> None:
    plan = _every_stage(tmp_path)
    found = []
    for workers in ("1", "3"):
        done = run(plan, "--workers", workers)
        assert done.returncode == 0, done.stderr
        found.append(everything(plan.parent))
        tasks = [stats(plan.parent, rank)["steps"] for rank in range(len(load_plan(plan.resolve()).tasks))]
        clear(plan)
    reasons = {reason for steps in tasks for step in steps.values() for reason in step["removed"]}
    assert reasons >= {*clean.DUPLICATES, *overlap.REMOVED, "max_tokens"}
    for stage in ("1_sign", "2_join", "2_compare", "2_judge", "2_count", "2_take", "3_write"):
        with subprocess.Popen(command(plan, "--workers", "2"), stderr=subprocess.DEVNULL) as process:
            wait_until(lambda stage=stage: list(plan.parent.glob(f"logs/{stage}/logs/*.log")), process, poll_s=0.01)
            process.kill()
    assert run(plan).returncode == 0
    assert found[0] == found[1] == everything(plan.parent)


def test_output_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    first, second = (execute(blend(tmp_path / name)) for name in ("one", "two/deeper"))
    same = [{path.name: path.read_bytes() for path in work.glob("tokens/*")} for work in (first, second)]
    assert same[0] == same[1]


@pytest.mark.parametrize("finders", [1, 3])
def test_earlier_task_wins_over_lower_number(tmp_path: Path, finders: int) -> None:
    shared = [sentence(n) for n in range(40)]
    first = write_jsonl(tmp_path / "1.jsonl", *map(sentence, range(100, 150)), *shared)  # shared texts: high numbers
    second = write_jsonl(tmp_path / "2.jsonl", *(f" {text}\n" for text in shared))  # shared texts: low numbers
    work = execute(write_plan(tmp_path, [{"files": [first]}, {"files": [second]}], finders=finders))
    assert texts(work, 0)[50:] == shared
    assert texts(work, 1) == []
    assert not (work / "tokens" / "00001.train.bin").exists()
    assert stats(work, 1)["steps"]["deduplicate"] == {"in": 40, "kept": 0, "removed": {"duplicate": 40}}
    where = {"id": "2.jsonl:1", "where": f"{second}:1", "bytes": len(shared[0].encode()) + 2}
    assert removed(work, 1)[0] == {"step": "deduplicate", "reason": "duplicate", **where}


def test_unicode_form_blanks_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    first = [f"{sentence(n)} Café.\n\nA second paragraph, no. {n}." for n in range(6)]
    chance = random.Random(0)
    again = [
        *(change(text, chance) for change, text in zip(EQUAL.values(), first, strict=False)),
        first[4].replace(" ", "\u00a0").replace("\n", "\u2028"),
        f"\t{first[5]} \n",
    ]
    others = [first[0].replace("Café", "Cafe"), first[1].replace("paragraph", "para graph"), first[2].upper()]
    files = [write_jsonl(tmp_path / name, *many) for name, many in (("1.jsonl", first), ("2.jsonl", again + others))]
    work = execute(write_plan(tmp_path, [{"files": [file]} for file in files]))
    assert (texts(work, 0), texts(work, 1)) == (first, others)
    assert [line["where"] for line in removed(work, 1)] == [f"{files[1]}:{n}" for n in range(1, 7)]
    assert stats(work, 1)["steps"]["deduplicate"]["removed"] == {"duplicate": 6}


@pytest.mark.parametrize("seed", ["1", "2"])
def test_sources_that_share_a_file_have_ids_of_their_own(tmp_path: Path, seed: str) -> None:
    shared = write_jsonl(tmp_path / "input/a/b/shared.jsonl", *map(sentence, range(3)))
    near = write_jsonl(tmp_path / "input/a/b/near.jsonl", sentence(3))
    far = write_jsonl(tmp_path / "input/far.jsonl", sentence(4))
    tasks = [{"source": name, "files": [shared, other]} for name, other in (("one", near), ("two", far))]
    plan = write_plan(tmp_path, [{**task, "split": "heldout"} for task in tasks], deduplicate=False)
    done = run(plan, PYTHONHASHSEED=seed)
    assert done.returncode == 0, done.stderr
    held = [(plan.parent / "tokens" / f"{rank:05d}.heldout.jsonl").read_text().splitlines() for rank in (0, 1)]
    ids = [[json.loads(line)["id"] for line in lines] for lines in held]
    assert ids[0] == ["shared.jsonl:1", "shared.jsonl:2", "shared.jsonl:3", "near.jsonl:1"]
    assert ids[1] == ["a/b/shared.jsonl:1", "a/b/shared.jsonl:2", "a/b/shared.jsonl:3", "far.jsonl:1"]


def test_filter(tmp_path: Path) -> None:
    file = tmp_path / "1.jsonl"
    lines = [{"text": "  \n"}, {"text": " short "}, {"text": "long enough", "bucket": "tail"}]
    lines += [{"text": "long enough, too", "bucket": "head"}, {"text": "of no bucket at all"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tasks = [{"files": [str(file)], "options": {"bucket": ["head", "middle"]}}]
    work = execute(write_plan(tmp_path, tasks, min_characters=8))
    assert texts(work) == ["long enough, too"]
    assert stats(work)["steps"]["filter"]["removed"] == {"empty": 1, "too short": 1, "other bucket": 2}


def test_redpajama_as_published(tmp_path: Path) -> None:
    name = "2023-06/0000/en_head"
    documents = [{"raw_content": sentence(n), "bucket": "tail" if n == 4 else "head"} for n in range(6)]
    file = tmp_path / f"documents/{name}.json.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress("".join(json.dumps(document) + "\n" for document in documents).encode()))
    listed = tmp_path / f"duplicates/{name}.duplicates.parquet"
    listed.parent.mkdir(parents=True)
    table = {"shard_id": [name] * 2, "doc_id": [f"{name}.json.gz/{row}" for row in (0, 3)], "digest": ["", ""]}
    pyarrow.parquet.write_table(pyarrow.table(table), listed)
    options = {"bucket": "head", "duplicates": {str(file): str(listed)}}
    task = {"files": [str(file)], "reader": "redpajama_v2", "options": options}
    work = execute(write_plan(tmp_path / "as_published", [task]))
    assert texts(work) == [documents[n]["raw_content"] for n in (1, 2, 5)]
    assert stats(work)["steps"]["deduplicate"]["removed"] == {"listed": 2}
    assert [line["where"].rpartition(":")[2] for line in removed(work) if line["reason"] == "listed"] == ["1", "4"]
    listed.write_bytes(b"no Parquet")
    work = execute(write_plan(tmp_path / "broken_list", [task]))
    assert len(texts(work)) == 5
    assert stats(work)["steps"]["read"]["removed"] == {"unreadable list of duplicates": 1}


def test_changed_plan_is_refused(tmp_path: Path) -> None:
    plan = blend(tmp_path)
    assert run(plan).returncode == 0
    before = everything(plan.parent)
    assert run(plan).returncode == 0
    plan.write_text(plan.read_text().replace('"seed": 1234', '"seed": 4321'), encoding="utf-8")
    refused = run(plan)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "holds work of another plan (seed changed)" in refused.stderr
    assert everything(plan.parent) == before


def test_input_changed_between_the_passes_is_an_error(tmp_path: Path) -> None:
    plan = blend(tmp_path)
    assert run(plan).returncode == 0
    for path in (plan.parent / "logs" / "3_write" / "completions").iterdir():
        path.unlink()
    write_jsonl(tmp_path / "input" / "3.jsonl", "other", "documents")
    refused = run(plan, "--workers", "1")
    assert refused.returncode == 2
    assert "changed after the first pass over it: task " in refused.stderr
    assert f"Delete {tmp_path} and start again" in refused.stderr


def _limited(plan: Path, limit: str) -> subprocess.CompletedProcess[str]:
    """Run the command under a `ulimit` of the shell."""
    words = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *command(plan, "--workers", "2")]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANG_S)


def test_more_tasks_than_open_files(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "everywhere", sentence(n)) for n in range(90)]
    plan = write_plan(tmp_path, [{"files": [file]} for file in files])
    done = _limited(plan, "-Sn 64")
    assert done.returncode == 0, done.stderr
    duplicates = [stats(plan.parent, rank)["steps"]["deduplicate"]["removed"] for rank in range(90)]
    assert duplicates == [{}, *[{"duplicate": 1}] * 89]


def test_no_room(tmp_path: Path) -> None:
    plan = blend(tmp_path, documents=2000, words=60)
    full = _limited(plan, "-f 20")  # the largest file size (KiB); this limit also stops the logs
    assert full.returncode == 2
    assert full.stderr.startswith("error: ")
    assert "File too large" in full.stderr
    assert run(plan).returncode == 0


def test_refuses_a_folder_named_like_a_pattern(tmp_path: Path) -> None:
    refused = run(blend(tmp_path / "a[b]"))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "which datatrove reads as a pattern" in refused.stderr
