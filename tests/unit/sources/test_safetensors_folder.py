"""Opening a safetensors folder, reading it from several threads, and refusing damaged ones."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import open_dense
from nemo_upcycle.errors import CheckpointError
from tests.models import weights_of, write_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "dense", shards=3)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://organisation/model", "hf download organisation/model"),
        ("nemo://somewhere", "nemo://somewhere is a relative path"),
        ("nemoo:///somewhere", "'nemoo' does not exist. Did you mean 'nemo'"),
    ],
)
def test_what_is_no_address_is_refused(folder: Path, address: str, words: str) -> None:
    assert open_dense(f"hf://{folder}").architecture == open_dense(folder).architecture
    with pytest.raises(CheckpointError, match=words):
        open_dense(address)


@pytest.mark.parametrize(
    "content",
    [
        *(None, b"", b"PK\x03\x04" + b"x" * 60, (10).to_bytes(8, "little") + b"notjson!!!"),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,  # nested too deeply
    ],
    ids=["missing", "empty", "zip", "text", "deep"],
)
def test_refuses_damaged_or_missing_files_before_reading(folder: Path, content: bytes | None) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name} is truncated or damaged"):
        open_dense(folder)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        open_dense(folder)


def _write(path: Path, header: Any, data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def _entry(start: int, stop: int, **changes: object) -> dict:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]} | changes


@pytest.mark.parametrize(
    "header",
    [{"a": _entry(0, 16), "b": _entry(8, 24)}, {"a": _entry(0, 16)}, {"a": _entry(0, 24, shape=[7])}, {"a": 3}],
)
def test_a_header_that_does_not_fit_the_data_is_refused(dense: Path, tmp_path: Path, header: Any) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "copy"))
    _write(folder / "model.safetensors", header, bytes(24))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        open_dense(folder)


@pytest.mark.parametrize(("kind", "size"), [("F8_E4M3", 24), ("I32", 6)])
def test_types_that_weights_do_not_come_in_are_refused(dense: Path, tmp_path: Path, kind: str, size: int) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "copy"))
    _write(folder / "model.safetensors", {"a": _entry(0, 24, dtype=kind, shape=[size])}, bytes(24))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors has a in {kind}, .*Use the unquantized checkpoint"
    ):
        open_dense(folder)


def test_the_index_and_the_shards_must_agree(folder: Path) -> None:
    path, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    index = json.loads(path.read_text())
    moved = index["weight_map"] | {"model.norm.weight": files[0].name}
    path.write_text(json.dumps(index | {"weight_map": moved}))
    with pytest.raises(CheckpointError, match=rf"{files[0].name} has no model\.norm\.weight, which "):
        open_dense(folder)
    path.write_text(json.dumps(index))
    save_file(load_file(files[0]) | {"model.norm.weight": torch.ones(64)}, files[0])
    with pytest.raises(CheckpointError, match=r"has model\.norm\.weight, and so does model-00001-of-\d+\.safetensors"):
        open_dense(folder)


@pytest.mark.parametrize(
    ("index", "got"),
    [
        *(([], "no weight_map"), ({}, "no weight_map"), ({"weight_map": []}, "no weight_map")),
        ({"weight_map": {"a": 3}}, "which is not in the folder"),
        ({"weight_map": {"x": "../elsewhere.safetensors"}}, "elsewhere.safetensors, which is not in the folder"),
    ],
)
def test_an_index_that_is_none_or_points_outside_is_refused(folder: Path, index: object, got: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_dense(folder)
    assert got in str(caught.value.got)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_named_with_the_way_to_safetensors(dense: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "copy"))
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"but {name}\. .*save_pretrained\(FOLDER, safe_serialization"):
        open_dense(folder)


def test_names_a_model_saved_without_its_head(dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, folder / "model.safetensors")
    with (
        open_dense(folder) as source,
        pytest.raises(
            CheckpointError, match=r"has norm\.weight instead of model\.norm\.weight: .* saved without its head"
        ),
    ):
        source.read("model.norm.weight")


def test_refuses_an_moe_that_cannot_grow(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["GraniteMoeForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"whose experts lie in one tensor\. Give its dense parent"):
        open_dense(folder)


def test_refuses_an_index_beside_another_single_file(tmp_path: Path) -> None:
    """transformers takes the single file, so a leftover index would give other weights than expected."""
    folder = write_llama(tmp_path / "dense", layers=1)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    save_file({name: tensor * 2 for name, tensor in load_file(single).items()}, folder / "old.safetensors")
    names = list(load_file(single))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "old.safetensors")}))
    words = r"has both model\.safetensors\.index\.json \(naming old\.safetensors\) and model\.safetensors.*Remove"
    with pytest.raises(CheckpointError, match=words):
        open_dense(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    with open_dense(folder) as dense:
        assert set(dense.names()) == set(names)


def test_threads_may_read_at_the_same_time(folder: Path) -> None:
    tensors = weights_of(folder)
    with open_dense(folder) as dense, ThreadPoolExecutor(8) as pool:
        names = list(tensors) * 50
        for name, got in zip(names, pool.map(dense.read, names), strict=True):
            assert torch.equal(got, tensors[name])
        assert dense.bytes_read == 50 * sum(tensor.nbytes for tensor in tensors.values())
