"""Conversion without a training job: exactness, refusals, kept files, and recovery after errors.

`tests/unit/models/test_parents.py` compares the bits with the results of upcycling and exporting.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert import safetensors_writer
from nemo_upcycle.convert.expansion import Expansion
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.sources.mapped_files import MappedFiles
from nemo_upcycle.utils.files import MODEL_MARKER, is_complete, read_json
from nemo_upcycle.utils.streams import StreamedFile
from tests.folders import SPEC, change_config, converted
from tests.models import require_same_weights, weights_of
from tests.unit.convert.exports import write_checkpoint


FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}
SHARD_BYTES = 100_000


def _retyped(folder: Path, dtype: torch.dtype, *, norms: bool = True) -> Path:
    """Save a folder's weights in another dtype; `norms` says whether norms change as well."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {name: tensor.to(dtype) if norms or tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
        save_file(changed, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("change", [{"architectures": ...}, {"hidden_act": "swish"}])
def test_converts_parents_with_other_spellings_of_settings(dense: Path, tmp_path: Path, change: Any) -> None:
    copy = Path(shutil.copytree(dense, tmp_path / "copy"))
    converted(dense, tmp_path / "wanted")
    converted(change_config(copy, **change), tmp_path / "moe")
    require_same_weights(tmp_path / "wanted", tmp_path / "moe")
    assert read_json(tmp_path / "wanted/config.json") == read_json(tmp_path / "moe/config.json")


def test_half_precision_and_blocks_do_not_show(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that are too large to keep are built again for every copy."""
    converted(dense, tmp_path / "once", UpcycleSpec(**FINE), dtype=torch.bfloat16)
    monkeypatch.setattr("nemo_upcycle.convert.expansion.BLOCK_BYTES", 1000)
    monkeypatch.setattr("nemo_upcycle.convert.expansion.KEPT_BYTES", 0)
    converted(dense, tmp_path / "blocks", UpcycleSpec(**FINE), dtype=torch.bfloat16, max_shard_bytes=50_000)
    files = [load_file(file) for file in (tmp_path / "blocks").glob("*.safetensors")]
    assert len(files) > 10
    assert all(sum(tensor.nbytes for tensor in tensors.values()) <= 50_000 for tensors in files)
    require_same_weights(tmp_path / "once", tmp_path / "blocks")


def test_the_same_again_is_done_and_another_is_refused(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (not_ours := tmp_path / "other").mkdir()
    (not_ours / "notes").write_text("mine")
    first = converted(dense, tmp_path / "moe")
    marker = read_json(tmp_path / "moe" / MODEL_MARKER)
    assert (marker["bytes"], marker["tensors"]) == (first.bytes_total, len(weights_of(tmp_path / "moe")))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}
    assert not any(path.name.startswith(".") for path in (*times, *tmp_path.iterdir()))
    monkeypatch.chdir(dense.parent)
    again = converted(Path(dense.name), tmp_path / "moe")
    assert (first.files_kept, again.files_kept, again.bytes_written) == (0, again.files, 0)
    with pytest.raises(UpcycleError, match="finished folder made from other inputs"):
        converted(dense, tmp_path / "moe", UpcycleSpec(num_experts=4, top_k=3))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}
    with pytest.raises(UpcycleError, match="other holds files that this command did not write"):
        converted(dense, not_ours)
    for output in (dense, dense / "moe", dense.parent):
        with pytest.raises(UpcycleError, match=r"(is the same folder as|lies inside) "):
            converted(dense, output)


def test_a_tokenizer_that_comes_later_is_added(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    converted(copy, tmp_path / "moe")
    (tmp_path / "tokenizer.json").rename(copy / "tokenizer.json")
    assert converted(copy, tmp_path / "moe").bytes_written == 0
    assert (tmp_path / "moe/tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert "tokenizer.json" in read_json(tmp_path / "moe" / MODEL_MARKER)["companions"]


def test_a_finished_folder_that_lost_data_is_not_done(dense: Path, tmp_path: Path) -> None:
    converted(dense, tmp_path / "moe")
    for name, kept_bytes in (("model.safetensors", 5000), ("config.json", 0), ("tokenizer.json", 0)):
        file = tmp_path / "moe" / name
        whole = file.read_bytes()
        file.unlink()
        if kept_bytes:
            file.write_bytes(whole[:kept_bytes])
        with pytest.raises(
            UpcycleError, match=rf"moe has missing or damaged files: {name}.*Remove the folder and run"
        ):
            converted(dense, tmp_path / "moe")
        file.write_bytes(whole)


def test_a_link_to_an_empty_folder_is_filled(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    converted(dense, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert is_complete(tmp_path / "real")


def test_refuses_an_unsupported_file_type_before_writing(copy: Path, tmp_path: Path) -> None:
    _retyped(copy, torch.float64)
    with pytest.raises(UpcycleError, match=r"is float64; expected .*Add --dtype float32"):
        converted(copy, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    done = converted(copy, tmp_path / "moe", dtype=torch.float32)
    assert done.inexact_because[0].startswith("float64 weights are rounded to float32 (")


def test_factors_and_norms_that_a_type_rounds_are_told(copy: Path, tmp_path: Path) -> None:
    """Without `dtype`, all weights are written in the embedding's dtype."""
    done = converted(_retyped(copy, torch.float16, norms=False), tmp_path / "norms")
    assert done.inexact_because == (
        "float32 weights are rounded to float16 (model.layers.0.input_layernorm.weight and 8 more)",
    )
    done = converted(copy, tmp_path / "same size", dtype=torch.bfloat16)
    assert done.inexact_because[0].startswith("float16 weights are rounded to bfloat16 (model.")
    _retyped(copy, torch.bfloat16)
    spec = UpcycleSpec(num_experts=6, top_k=3, granularity=3)
    done = converted(copy, tmp_path / "odd", spec)
    assert done.inexact_because == ("the factor 3 on the down projection is rounded in bfloat16",)
    assert converted(copy, tmp_path / "float32", spec, dtype=torch.float32).exact
    assert converted(copy, tmp_path / "even", UpcycleSpec(num_experts=4, top_k=2, granularity=2)).exact


def test_weights_without_config_are_refused_before_anything_is_written(copy: Path, tmp_path: Path) -> None:
    """A NeMo checkpoint can be read, but it has neither a config.json nor a Hugging Face tokenizer."""
    with open_dense(copy) as source:
        (copy / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json.*Export the checkpoint first"):
            convert(source, tmp_path / "moe", SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_nemo_source_that_changed_is_not_done(dense: Path, tmp_path: Path) -> None:
    """NeMo's files lie in `weights/`, and a flipped bit leaves their sizes unchanged."""
    source = write_checkpoint(tmp_path / "nemo", dense, None)
    shutil.copy(dense / "config.json", source / "config.json")
    assert converted(source, tmp_path / "moe").files_kept == 0
    assert converted(source, tmp_path / "moe").files_kept == 1
    file = next((source / "weights").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UpcycleError, match="finished folder made from other inputs"):
        converted(source, tmp_path / "moe")
    assert len(read_json(tmp_path / "moe" / MODEL_MARKER)["made_from"]["sources"]) == 1


def _kill_after(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run when it has written one file more than `files`."""
    done: list[list[str]] = []
    write_tensors = Expansion.write_tensors

    def write(self: Expansion, file: StreamedFile, names: list[str], advance: Any) -> None:
        write_tensors(self, file, names, advance)
        done.append(names)
        if len(done) > files:
            raise KeyboardInterrupt

    monkeypatch.setattr(Expansion, "write_tensors", write)


def test_a_stopped_run_goes_on_with_the_rest(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted(dense, tmp_path / "whole", max_shard_bytes=SHARD_BYTES)
    _kill_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        converted(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    assert not (tmp_path / "moe").exists()
    aside = tmp_path / ".moe.partial"
    assert not list(aside.glob("*.unfinished"))
    # A killed process cleans up nothing. Its leftovers must not count as used space when free space is checked.
    for name in ("model-00009-of-00009.safetensors.unfinished", ".config.json.half.4711"):
        (aside / name).write_bytes(b"half")
    require_disk = safetensors_writer.require_disk

    def room(folder: Path, *given: Any) -> None:
        assert {path.name[-11:] for path in aside.iterdir()} == {".lock", "ersion.json", "safetensors"}
        require_disk(folder, *given)

    monkeypatch.setattr(safetensors_writer, "require_disk", room)
    done = converted(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    assert done.files_kept == 3
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "moe" / file.name).read_bytes()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    for name in (".lock", ".conversion.json"):  # files that a kill at the very end leaves
        (tmp_path / "moe" / name).write_text("{}")
    assert converted(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES).bytes_written == 0
    assert {path.name for path in (tmp_path / "moe").iterdir()} == names


@pytest.mark.parametrize(
    ("spec", "dtype", "added"),
    [(replace(SPEC, seed=5), None, 0), (SPEC, torch.bfloat16, 0), (SPEC, None, 1)],
    ids=["spec", "type", "weights"],
)
def test_files_made_of_something_else_are_not_kept(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: UpcycleSpec, dtype: Any, added: int
) -> None:
    _kill_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        converted(copy, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    for file in copy.glob("*.safetensors"):  # keep names, shapes and sizes
        save_file({name: tensor + added for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    options = {"dtype": dtype, "max_shard_bytes": SHARD_BYTES}
    assert converted(copy, tmp_path / "moe", spec, **options).files_kept == 0
    converted(copy, tmp_path / "afresh", spec, **options)
    require_same_weights(tmp_path / "moe", tmp_path / "afresh")


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
            converted(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "moe").exists()
    done = converted(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    assert 1 <= done.files_kept < done.files


def test_a_disk_that_is_full_while_writing_is_told(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """`test_export.py` tests a disk that is full before writing starts."""
    fsync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UpcycleError, match=r"The disk of .*moe is full\..*finished files are kept"):
        converted(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    assert converted(dense, tmp_path / "moe", max_shard_bytes=SHARD_BYTES).files_kept >= 3


DOWN = "model.layers.3.mlp.down_proj.weight"


def test_a_broken_source_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    index = read_json(copy / "model.safetensors.index.json")["weight_map"]
    tensors = load_file(copy / index[DOWN])
    tensors[DOWN].fill_(float("nan"))
    save_file(tensors, copy / index[DOWN], {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{DOWN} has NaN or infinite values \(6144\)"):
        converted(copy, tmp_path / "moe", max_shard_bytes=SHARD_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
