"""Converting when something goes wrong: stopped runs, changed or broken sources, full disks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert import safetensors_writer
from nemo_upcycle.convert.expansion import Expansion
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.sources.mapped_files import MappedFiles
from nemo_upcycle.utils.files import MODEL_MARKER, read_json
from nemo_upcycle.utils.streams import StreamedFile
from tests.models import require_same_weights
from tests.unit.convert.exports import SPEC, _convert, _Usage, write_checkpoint
from tests.waiting import wait_until


ROOT = Path(__file__).parents[3]
SHARD_BYTES = 100_000


def test_a_nemo_source_that_changed_is_not_done(dense: Path, tmp_path: Path) -> None:
    """Its files lie in `weights/`, and a change of one bit leaves their sizes alone."""
    source = write_checkpoint(tmp_path / "nemo", dense, None)
    shutil.copy(dense / "config.json", source / "config.json")
    assert _convert(source, tmp_path / "moe").files_kept == 0
    assert _convert(source, tmp_path / "moe").files_kept == 1
    file = next((source / "weights").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UpcycleError, match="finished folder made from something else"):
        _convert(source, tmp_path / "moe")
    assert len(read_json(tmp_path / "moe" / MODEL_MARKER)["made_from"]["sources"]) == 1


def _kill_after(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run at the end of the file after this many."""
    done: list[list[str]] = []
    write_tensors = Expansion.write_tensors

    def write(self: Expansion, file: StreamedFile, names: list[str], advance: Any) -> None:
        write_tensors(self, file, names, advance)
        done.append(names)
        if len(done) > files:
            raise KeyboardInterrupt

    monkeypatch.setattr(Expansion, "write_tensors", write)


def test_a_stopped_run_goes_on_with_what_is_missing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _convert(dense, tmp_path / "whole", max_shard_bytes=SHARD_BYTES)
    _kill_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    assert not (tmp_path / "moe").exists()
    aside = tmp_path / ".moe.partial"
    assert not list(aside.glob("*.unfinished"))
    # A process that is killed clears nothing: what it leaves must not count as used when room is looked for.
    for name in ("model-00009-of-00009.safetensors.unfinished", ".config.json.half.4711"):
        (aside / name).write_bytes(b"half")
    require_disk = safetensors_writer.require_disk

    def room(folder: Path, *given: Any) -> None:
        assert {path.name[-11:] for path in aside.iterdir()} == {".lock", "ersion.json", "safetensors"}
        require_disk(folder, *given)

    monkeypatch.setattr(safetensors_writer, "require_disk", room)
    done = _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    assert done.files_kept == 3
    assert done.bytes_written < done.bytes_total
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "moe" / file.name).read_bytes()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    for name in (".lock", ".conversion.json"):  # as a kill at the very end leaves them
        (tmp_path / "moe" / name).write_text("{}")
    assert _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES).bytes_written == 0
    assert {path.name for path in (tmp_path / "moe").iterdir()} == names


@pytest.mark.parametrize("change", ["spec", "weights", "type"])
def test_files_made_from_something_else_are_not_kept(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    _kill_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        _convert(copy, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    spec, options = SPEC, {}
    if change == "spec":
        spec = UpcycleSpec(num_experts=4, top_k=2, seed=5)
    elif change == "type":
        options = {"dtype": torch.bfloat16}
    else:
        for file in copy.glob("*.safetensors"):  # the same names, shapes and sizes
            save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    done = _convert(copy, tmp_path / "moe", spec, max_shard_bytes=SHARD_BYTES, **options)
    assert done.files_kept == 0
    _convert(copy, tmp_path / "afresh", spec, max_shard_bytes=SHARD_BYTES, **options)
    require_same_weights(tmp_path / "moe", tmp_path / "afresh")


_HELD = """
import sys, time
from pathlib import Path
from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.expansion import Expansion
from nemo_upcycle.convert.offline import convert
dense, output, shard_bytes = sys.argv[1:]
write_copies, aside = Expansion._write_copies, Path(output).with_name(".moe.partial")
def held(*given):
    while len(list(aside.glob("*.safetensors"))) >= 2: time.sleep(0.05)
    write_copies(*given)
Expansion._write_copies = held
with open_dense(dense) as source:
    convert(source, Path(output), UpcycleSpec(num_experts=4), max_shard_bytes=int(shard_bytes))
"""


@pytest.mark.slow
def test_killed_for_real_it_leaves_no_result_and_goes_on(dense: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HELD, str(dense), str(tmp_path / "moe"), str(SHARD_BYTES)]
    process = subprocess.Popen(command, cwd=ROOT)
    aside = tmp_path / ".moe.partial"
    wait_until(lambda: len(list(aside.glob("*.safetensors"))) >= 2, process)
    with pytest.raises(UpcycleError, match="another process writing it"):
        _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "moe").exists()
    assert _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES).files_kept >= 2
    _convert(dense, tmp_path / "whole")
    require_same_weights(tmp_path / "moe", tmp_path / "whole")


def test_a_read_error_keeps_what_is_finished(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, preadv = [], os.preadv

    def fails_once(descriptor: int, buffers: Any, offset: int, *_: int) -> int:
        reads.append(offset)
        if len(reads) == 15:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails_once)
        patch.setattr(MappedFiles, "_is_cached", lambda *_: False)
        with pytest.raises(CheckpointError, match="Input/output error"):
            _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "moe").exists()
    done = _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    assert 1 <= done.files_kept < done.files
    _convert(dense, tmp_path / "whole", max_shard_bytes=SHARD_BYTES)
    require_same_weights(tmp_path / "moe", tmp_path / "whole")


def test_a_full_disk_is_told_before_or_while_writing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UpcycleError, match=r"disk space for convert moe.*Fix: free some space"):
        _convert(dense, tmp_path / "moe")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    fsync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UpcycleError, match=r"got full, expected room.*finished files are kept"):
        _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    assert _convert(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES).files_kept >= 3


DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda w: w.fill_(float("nan")), {}, rf"{DOWN}: got 6144 values that are NaN or infinite"),
        (lambda w: w.mul_(1e6), {"dtype": torch.float16}, rf"{DOWN}: got larger ones.*float16 can hold"),
        (lambda w: w[:, :90].contiguous(), {}, rf"shape of {DOWN}: got \[64, 90\], expected \[64, 96\]"),
    ],
    ids=["nan", "overflow", "shape"],
)
def test_a_broken_source_is_refused_and_leaves_nothing(
    copy: Path, tmp_path: Path, change: Any, options: dict[str, Any], words: str
) -> None:
    index = read_json(copy / "model.safetensors.index.json")["weight_map"]
    tensors = load_file(copy / index[DOWN])
    save_file(tensors | {DOWN: change(tensors[DOWN])}, copy / index[DOWN], {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        _convert(copy, tmp_path / "moe", max_shard_bytes=SHARD_BYTES, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
