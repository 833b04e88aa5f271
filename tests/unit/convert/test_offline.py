"""Converting without a training job: what is kept, what is exact, what is refused; `test_parents.py` has the bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.utils.files import MODEL_MARKER, is_complete, read_json, write_json
from tests.models import require_same_weights, weights_of, write_llama
from tests.unit.convert.exports import COPY, SPEC, _convert


FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}


def _retyped(folder: Path, dtype: torch.dtype, *, norms: bool = True) -> Path:
    """Save a folder's weights in another type, norms included or not."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {name: tensor.to(dtype) if norms or tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
        save_file(changed, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change", [{"architectures": None}, {"hidden_act": "swish"}, {"architectures": None, "model_type": "llama"}]
)
def test_a_parent_that_says_less_or_in_other_words_is_converted(
    dense: Path, copy: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    _convert(dense, tmp_path / "wanted")
    config = read_json(copy / "config.json") | change
    write_json(copy / "config.json", {name: value for name, value in config.items() if value is not None})
    _convert(copy, tmp_path / "moe")
    require_same_weights(tmp_path / "wanted", tmp_path / "moe")
    assert read_json(tmp_path / "wanted/config.json") == read_json(tmp_path / "moe/config.json")


def test_half_precision_and_small_blocks_change_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices that are too large to be kept are made again for every copy."""
    _convert(dense, tmp_path / "once", UpcycleSpec(**FINE), dtype=torch.bfloat16)
    monkeypatch.setattr("nemo_upcycle.convert.expansion.BLOCK_BYTES", 1000)
    monkeypatch.setattr("nemo_upcycle.convert.expansion.KEPT_BYTES", 0)
    _convert(dense, tmp_path / "blocks", UpcycleSpec(**FINE), dtype=torch.bfloat16, max_shard_bytes=50_000)
    assert len(list((tmp_path / "blocks").glob("*.safetensors"))) > 10
    require_same_weights(tmp_path / "once", tmp_path / "blocks")


def test_the_same_again_is_done_already_and_another_is_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (not_ours := tmp_path / "other").mkdir()
    (not_ours / "notes").write_text("mine")
    first = _convert(dense, tmp_path / "moe")
    marker = read_json(tmp_path / "moe" / MODEL_MARKER)
    assert (marker["bytes"], marker["tensors"]) == (first.bytes_total, len(weights_of(tmp_path / "moe")))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}
    assert not any(path.name.startswith(".") for path in (*times, *tmp_path.iterdir()))
    monkeypatch.chdir(dense.parent)
    again = _convert(Path(dense.name), tmp_path / "moe")
    assert (first.files_kept, again.files_kept, again.bytes_written) == (0, again.files, 0)
    with pytest.raises(UpcycleError, match="finished folder made from something else"):
        _convert(dense, tmp_path / "moe", UpcycleSpec(num_experts=4, top_k=3))
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "moe").iterdir()}
    with pytest.raises(UpcycleError, match="files that are not ours"):
        _convert(dense, not_ours)
    for output in (dense, dense / "moe", dense.parent):
        with pytest.raises(UpcycleError, match=r"got (the same folder|one inside the other)"):
            _convert(dense, output)
    assert is_complete(tmp_path / "moe")


def test_a_plan_that_is_none_is_something_else(dense: Path, tmp_path: Path) -> None:
    _convert(dense, tmp_path / "moe")
    marker = read_json(tmp_path / "moe" / MODEL_MARKER)
    for made_from in (None, [], "plan", {}, *({"spec": spec} for spec in (None, {"top_k": 99}, {"method": []}))):
        write_json(tmp_path / "moe" / MODEL_MARKER, marker | {"made_from": made_from})
        with pytest.raises(UpcycleError, match="finished folder made from something else"):
            _convert(dense, tmp_path / "moe")


def test_a_tokenizer_that_comes_later_is_added(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    _convert(copy, tmp_path / "moe")
    (tmp_path / "tokenizer.json").rename(copy / "tokenizer.json")
    assert _convert(copy, tmp_path / "moe").bytes_written == 0
    assert (tmp_path / "moe/tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert "tokenizer.json" in read_json(tmp_path / "moe" / MODEL_MARKER)["companions"]


def test_a_finished_folder_that_lost_a_file_or_half_of_one_is_not_done(dense: Path, tmp_path: Path) -> None:
    _convert(dense, tmp_path / "moe")
    for name, kept_bytes in (("model.safetensors", 5000), ("config.json", 0), ("tokenizer.json", 0)):
        file = tmp_path / "moe" / name
        whole = file.read_bytes()
        file.unlink()
        if kept_bytes:
            file.write_bytes(whole[:kept_bytes])
        with pytest.raises(UpcycleError, match=rf"moe: got no whole {name}.*Fix: remove the folder and run"):
            _convert(dense, tmp_path / "moe")
        file.write_bytes(whole)


def test_a_link_to_an_empty_folder_is_filled(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _convert(dense, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert is_complete(tmp_path / "real")


def test_a_type_that_no_file_holds_is_refused_before_anything_is_written(copy: Path, tmp_path: Path) -> None:
    _retyped(copy, torch.float64)
    with pytest.raises(UpcycleError, match=r"got float64, expected .*Fix: add --dtype float32"):
        _convert(copy, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    done = _convert(copy, tmp_path / "moe", dtype=torch.float32)
    assert done.inexact_because[0].startswith("float64 weights are rounded to float32 (")


@pytest.mark.parametrize(
    ("stored", "dtype", "reason"),
    [
        (torch.float32, torch.float32, ""),
        (torch.bfloat16, torch.float32, ""),
        (torch.float16, torch.float32, ""),
        (torch.float32, torch.bfloat16, "float32 weights are rounded to bfloat16 (model."),
        (torch.bfloat16, torch.float16, "bfloat16 weights are rounded to float16 (model."),
        (torch.float16, torch.bfloat16, "float16 weights are rounded to bfloat16 (model."),
    ],
)
def test_a_type_that_rounds_is_not_exact(
    copy: Path, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, reason: str
) -> None:
    done = _convert(_retyped(copy, stored), tmp_path / "moe", dtype=dtype)
    assert done.exact is (not reason)
    assert "".join(done.inexact_because).startswith(reason)


def test_factors_and_norms_that_a_type_rounds_are_told(copy: Path, tmp_path: Path) -> None:
    """Without `dtype`, all is written in the embedding's type."""
    done = _convert(_retyped(copy, torch.float16, norms=False), tmp_path / "norms")
    assert done.inexact_because == (
        "float32 weights are rounded to float16 (model.layers.0.input_layernorm.weight and 8 more)",
    )
    _retyped(copy, torch.bfloat16)
    spec = UpcycleSpec(num_experts=6, top_k=3, granularity=3)
    done = _convert(copy, tmp_path / "odd", spec)
    assert done.inexact_because == ("the factor 3 on the down projection is rounded in bfloat16",)
    assert _convert(copy, tmp_path / "float32", spec, dtype=torch.float32).exact
    assert _convert(copy, tmp_path / "even", UpcycleSpec(num_experts=4, top_k=2, granularity=2)).exact


def test_weights_without_config_are_refused_before_anything_is_written(copy: Path, tmp_path: Path) -> None:
    """A NeMo checkpoint can be read, but has neither config.json nor a tokenizer of Hugging Face's."""
    with open_dense(copy) as source:
        (copy / "config.json").unlink()
        with pytest.raises(CheckpointError, match="export the checkpoint first"):
            convert(source, tmp_path / "moe", SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("fields", "parent", "words"),
    [
        ({"router_score": "sigmoid", "moe_layers": "every-2"}, {}, "dense layers behind an MoE layer .Glm4-MoE"),
        (
            {"routed_scaling_factor": 2.5},
            *({}, "got a routed_scaling_factor .*or route by router_score='sigmoid' with "),
        ),
        ({"shared_experts": 1}, {"head_dim": 32}, "heads that do not make up the hidden size"),
        ({}, {"mlp_bias": True}, "got biases of the feed-forward network"),
        ({}, {"attention_bias": True}, "got a bias of the attention's output"),
        ({"moe_layers": (9,)}, {}, "moe_layers: got 9"),
    ],
)
def test_what_no_class_can_hold_is_refused(
    tmp_path: Path, fields: dict[str, Any], parent: dict[str, Any], words: str
) -> None:
    folder = write_llama(tmp_path / "dense", layers=2, **parent)
    with pytest.raises(SpecError, match=words):
        _convert(folder, tmp_path / "moe", UpcycleSpec(**(COPY | fields)))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
