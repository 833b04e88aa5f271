"""Runs the engine and reads its output."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from nemo_upcycle.data.engine.pipelines import RunOn, executor, stages
from nemo_upcycle.data.engine.tasks import load_plan
from nemo_upcycle.data.engine.tokenise import FASTOKENS
from tests.data_engine.blend import tokenizer_json, write_plan
from tests.waiting import HANG_S


def clear(plan: Path) -> None:
    """Remove all files that the runs of a plan wrote beside the plan."""
    subprocess.run(["rm", "-r", *(str(path) for path in plan.parent.iterdir() if path != plan)], check=True)


def execute(plan_path: Path, library: str = FASTOKENS) -> Path:
    """Run all stages in this process, and return the output folder."""
    plan = load_plan(plan_path.resolve())
    for stage in stages(plan, library):
        runs = executor(plan, stage, RunOn())
        for rank in range(stage.tasks):
            runs._run_for_rank(rank)
    return plan.folder


def command(plan_path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "nemo_upcycle.data.engine", str(plan_path), *arguments]


def run(plan_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the engine's command."""
    env = {**os.environ, **environment}
    return subprocess.run(command(plan_path, *arguments), capture_output=True, text=True, timeout=HANG_S, env=env)


def tokens(work: Path, rank: int, split: str = "train") -> list[list[int]]:
    """Read an indexed dataset as Megatron does, and return the token ids of its documents."""
    raw = (work / "tokens" / f"{rank:05d}.{split}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, kind, sequences, documents = struct.unpack_from("<QBQQ", raw, 9)
    assert version == 1
    dtype = {4: np.int32, 8: np.uint16}[kind]
    lengths = np.frombuffer(raw, np.int32, sequences, 34)
    pointers = np.frombuffer(raw, np.int64, sequences, 34 + 4 * sequences)
    ends = np.frombuffer(raw, np.int64, documents, 34 + 12 * sequences)
    assert len(raw) == 34 + 12 * sequences + 8 * documents
    assert ends.tolist() == list(range(sequences + 1))
    stored = (work / "tokens" / f"{rank:05d}.{split}.bin").read_bytes()
    assert len(stored) == lengths.sum() * np.dtype(dtype).itemsize
    return [
        np.frombuffer(stored, dtype, length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]


def texts(work: Path, rank: int = 0, split: str = "train") -> list[str]:
    """Read the documents back, and check that each has only one end-of-text token, at its end."""
    if not (work / "tokens" / f"{rank:05d}.{split}.idx").exists():
        return []
    tokenizer = Tokenizer.from_str(tokenizer_json())
    found = tokens(work, rank, split)
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in found)
    return [tokenizer.decode(ids[:-1]) for ids in found]


def stats(work: Path, rank: int = 0) -> dict[str, Any]:
    """Return a task's counts, and check that they add up."""
    found = json.loads((work / "stats" / f"{rank:05d}.json").read_text(encoding="utf-8"))
    kept = None
    for step, counts in found["steps"].items():
        assert counts["in"] == counts["kept"] + sum(counts["removed"].values()), (step, counts)
        if kept is not None and step != "tokenise":  # decontamination can split a document
            assert counts["in"] == kept, step
        kept = counts["kept"]
    assert sum(split["documents"] for split in found["splits"].values()) == kept
    return found


def removed(work: Path, rank: int = 0) -> list[dict[str, Any]]:
    path = work / "removed" / f"{rank:05d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome(folder: Path, file: Path, **task: object) -> tuple[list[str], list[tuple[str, int]]]:
    """Run the engine on a file; return the texts that remain, and the reason and line of every loss or note."""
    work = execute(write_plan(folder, [{"files": [str(file)], **task}]))
    counts, lost = stats(work), removed(work)
    assert counts["steps"]["read"]["removed"] == {
        reason: sum(line["reason"] == reason for line in lost)
        for reason in {line["reason"] for line in lost} - {"NULs"}  # only a note: the document stays
    }
    assert all(line["step"] == "read" and line["where"].startswith(f"{file}:") for line in lost)
    return texts(work), [(line["reason"], int(line["where"].rpartition(":")[2])) for line in lost]


def everything(work: Path) -> dict[str, bytes]:
    """Return the bytes of all output files, without the times that some of the files contain."""
    whole = (*work.glob("tokens/*"), *work.glob("removed/*"))
    found = {str(path.relative_to(work)): path.read_bytes() for path in whole}
    for path in sorted(work.glob("stats/*")):
        counts = json.loads(path.read_text(encoding="utf-8"))
        del counts["seconds"]
        for file in counts["files"].values():
            file.pop("modified_ns", None)  # only local files have this time
        found[path.name] = json.dumps(counts).encode()
    return found


class Slurm:
    """Scripts at the front of PATH that stand in for Slurm's commands; each records its calls in a file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def says(self, command: str, script: str) -> None:
        calls = self.folder / f"{command}.calls"
        file = self.folder / command
        count = f'echo "$*" >> {calls}; calls=$(wc -l < {calls})'
        file.write_text(f"#!/bin/bash\n{count}\n{script}\n", encoding="utf-8")
        file.chmod(0o755)

    def calls(self, command: str) -> list[str]:
        return (self.folder / f"{command}.calls").read_text(encoding="utf-8").splitlines()
