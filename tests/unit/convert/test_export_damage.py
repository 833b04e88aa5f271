"""Damaged checkpoints are refused before anything is written, and no code from a checkpoint runs."""

from __future__ import annotations

import builtins
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint
from tests.unit.convert import exports
from tests.unit.convert.exports import SPEC, _leaves_nothing


dense, saved = exports.dense, exports.saved


@pytest.fixture
def spoiled(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    shutil.copytree(saved / "four", tmp_path / "spoiled")
    return tmp_path / "spoiled"


def _cut(weights: Path) -> str:
    file = max(weights.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return rf"{file.name}: got damaged data of .*copy the checkpoint again"


def _overwrite(weights: Path) -> str:
    for file in weights.glob("*.distcp"):
        file.write_bytes(b"\x00" * file.stat().st_size)
    return r"distcp: got damaged data"


def _remove_file(weights: Path) -> str:
    file = max(weights.glob("*.distcp"))
    file.unlink()
    return rf"got no {file.name}"


def _remove_metadata(weights: Path) -> str:
    (weights / ".metadata").unlink()
    return r"got no \.metadata.*was not finished"


@pytest.mark.parametrize("damage", [_cut, _overwrite, _remove_file, _remove_metadata])
def test_a_damaged_checkpoint_is_refused(spoiled: Path, dense: Path, damage: Callable[[Path], str]) -> None:
    words = damage(spoiled / "weights")
    with _leaves_nothing(spoiled.parent, CheckpointError, words):
        export_checkpoint(spoiled, dense, spoiled.parent / "hf", spec=SPEC)


def test_metadata_cut_anywhere_is_refused(spoiled: Path) -> None:
    path = spoiled / "weights/.metadata"
    whole = path.read_bytes()
    for length in [0, 1, *range(2, len(whole) - 1, len(whole) // 150)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="unreadable metadata"):
            DistributedCheckpoint(spoiled / "weights")


@pytest.mark.parametrize(
    "content", [b"{}", pickle.dumps({"state_dict_metadata": {}}), pickle.dumps([1]), b"\x80\x05N."]
)
def test_what_is_no_metadata_is_refused(spoiled: Path, content: bytes) -> None:
    (spoiled / "weights/.metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="unreadable metadata"):
        DistributedCheckpoint(spoiled / "weights")


class _Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("kind", ["system", "eval", "exec", "popen", "getattr"])
def test_code_that_metadata_names_is_not_run(spoiled: Path, dense: Path, kind: str) -> None:
    trace = spoiled / "trace"
    call = {
        "system": _Runs(os.system, f"touch {trace}"),
        "eval": _Runs(builtins.eval, f"open({str(trace)!r}, 'w')"),
        "exec": _Runs(builtins.exec, f"open({str(trace)!r}, 'w')"),
        "popen": _Runs(subprocess.Popen, ["touch", str(trace)]),
        "getattr": _Runs(builtins.getattr, "text", "upper"),
    }[kind]
    ran = pickle.loads(pickle.dumps(call))  # a plain unpickler does run it
    if isinstance(ran, subprocess.Popen):
        ran.wait()
    assert trace.exists() is (kind != "getattr")
    trace.unlink(missing_ok=True)
    (spoiled / "weights/.metadata").write_bytes(pickle.dumps({"state_dict_metadata": call}))
    with pytest.raises(CheckpointError, match=r"got unreadable metadata \(a dict\)"):
        export_checkpoint(spoiled, dense, spoiled.parent / "hf", spec=SPEC)
    assert not trace.exists()


def test_pieces_that_name_code_are_refused_and_not_run(spoiled: Path, dense: Path) -> None:
    """The tensors' own bytes are a pickle too."""
    trace = spoiled / "trace"
    evil = spoiled / "evil"
    torch.save(_Runs(os.system, f"touch {trace}"), evil)
    for file in (spoiled / "weights").glob("*.distcp"):
        content = evil.read_bytes()
        file.write_bytes((content * (file.stat().st_size // len(content) + 1))[: file.stat().st_size])
    with pytest.raises(CheckpointError, match="damaged data"):
        export_checkpoint(spoiled, dense, spoiled.parent / "hf", spec=SPEC)
    assert not trace.exists()
