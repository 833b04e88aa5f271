"""Reading slices of a safetensors folder, and what happens to a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import open_dense
from nemo_upcycle.errors import CheckpointError
from tests.models import write_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "dense", shards=3)


def _all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_slices_equal_the_whole_and_only_they_are_counted(folder: Path) -> None:
    tensors = _all(folder)
    with open_dense(folder) as dense:
        assert set(dense.names()) == set(tensors)
        name = "model.layers.1.mlp.down_proj.weight"
        part = dense.read(name, [(3, 9), (10, 40)])
        assert torch.equal(part, tensors[name][3:9, 10:40])
        assert dense.bytes_read == 6 * 30 * 4
        assert torch.equal(dense.read("model.norm.weight"), tensors["model.norm.weight"])


def test_addresses(folder: Path) -> None:
    assert open_dense(f"hf://{folder}").architecture == open_dense(folder).architecture
    with pytest.raises(CheckpointError, match="import it first"):
        open_dense("hf://organisation/model")
    with pytest.raises(CheckpointError, match=r"'hff' does not exist\. Did you mean 'hf'"):
        open_dense("hff:///somewhere")


def test_a_truncated_file_is_refused_before_anything_is_read(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=rf"{file.name}.*{len(data) - 100} bytes.*expected {len(data)} bytes"):
        open_dense(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 4, b"PK\x03\x04" + b"x" * 60, (10).to_bytes(8, "little") + b"notjson!!!"]
)
def test_what_is_not_safetensors_is_refused(folder: Path, content: bytes) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        open_dense(folder)


def test_a_shard_that_the_index_names_is_absent(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        open_dense(folder)


def test_an_index_cannot_point_outside_the_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="elsewhere"):
        open_dense(folder)


def test_other_formats_are_named(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "dense")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_dense(folder)


def test_an_moe_is_no_dense_parent(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a dense model"):
        open_dense(folder)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="I8"):
        open_dense(folder)
