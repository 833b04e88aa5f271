"""Export Megatron weights to a Hugging Face folder that computes the same function and is complete or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint, export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.trainers.equivalence import megatron_logits, one_rank
from nemo_upcycle.utils.files import MARKER, MODEL_MARKER, is_complete, read_json
from tests.folders import SPEC, change_config
from tests.loading.cases import logits
from tests.models import require_same_weights, sample_tokens, write_llama
from tests.unit.convert.exports import _fill, _leaves_nothing, write_checkpoint


FLOAT32 = {"dtype": torch.float32}


def test_every_layout_exports_to_the_same_bits(saved: Path, dense: Path, tmp_path: Path) -> None:
    for name in ("one", "four"):
        export_checkpoint(saved / name, dense, tmp_path / name, spec=SPEC, **FLOAT32)
    arch = read_architecture(dense).upcycled(SPEC)
    with one_rank():
        (model,) = _fill(dense, moe=True)
        export_weights(LiveWeights(model), arch, dense, tmp_path / "live", **FLOAT32)
        expected = megatron_logits(model.eval(), sample_tokens(259))[..., :259]
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "four", "live")}
    assert weights["one"] == weights["four"] == weights["live"]
    assert float((logits(tmp_path / "four", sample_tokens(259)) - expected).abs().max()) <= 1e-5
    assert float((logits(dense, sample_tokens(259)) - expected).abs().max()) > 1e-2  # the experts differ
    exact = load_file(tmp_path / "four/model.safetensors")
    marker = read_json(tmp_path / "four" / MODEL_MARKER)
    assert (marker["tensors"], marker["bytes"]) == (len(exact), arch.total_params * 4)
    export_checkpoint(saved / "one", dense, tmp_path / "half", spec=SPEC)
    half = load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(half[name], exact[name].to(torch.bfloat16)) for name in exact)
    assert read_json(tmp_path / "half/config.json")["torch_dtype"] == "bfloat16"


def test_a_dense_model_comes_back_bit_by_bit(saved: Path, dense: Path, tmp_path: Path) -> None:
    export_checkpoint(saved / "dense", dense, tmp_path / "hf", **FLOAT32)
    require_same_weights(dense, tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "hf", sample_tokens(259)), logits(dense, sample_tokens(259)))
    with _leaves_nothing(tmp_path, SpecError, r"/dense is a dense model, which has no spec"):
        export_checkpoint(saved / "dense", dense, tmp_path / "other", spec=SPEC)


def test_broken_weights_are_refused_by_name(dense: Path, tmp_path: Path) -> None:
    with one_rank():
        (model,) = _fill(dense, moe=True)
        model.decoder.layers[2].mlp.experts.local_experts[3].linear_fc2.weight.data[5, 7] = float("nan")
        arch = read_architecture(dense).upcycled(SPEC)
        name = r"model\.layers\.2\.block_sparse_moe\.experts\.3\.w2\.weight has NaN or infinite values \(1\)"
        with _leaves_nothing(tmp_path, CheckpointError, name):
            export_weights(LiveWeights(model), arch, dense, tmp_path / "hf")


def test_numbers_too_large_for_the_type_are_refused(dense: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC, factor=1e6)
    with _leaves_nothing(tmp_path, CheckpointError, r"\.weight has numbers too large for float16"):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC, dtype=torch.float16)
    with _leaves_nothing(tmp_path, UpcycleError, "Type of the weights on disk is float64"):
        export_checkpoint(checkpoint, dense, tmp_path / "double", spec=SPEC, dtype=torch.float64)


FINE = {"num_experts": 4, "top_k": 2, "granularity": 2}


def test_never_omits_unknown_weights(dense: Path, tmp_path: Path) -> None:
    spec = UpcycleSpec(**FINE, shared_experts=1)
    checkpoint = write_checkpoint(tmp_path / "ck", dense, spec)
    words = r"would omit: module\.decoder\.layers\.0\.mlp\.shared_experts\.\S+ .*--shared-experts"
    with _leaves_nothing(tmp_path, CheckpointError, words):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=UpcycleSpec(**FINE))
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=spec)
    qwen = Path(shutil.copytree(dense, tmp_path / "qwen"))
    change_config(qwen, architectures=["Qwen2ForCausalLM"])
    checkpoint = write_checkpoint(tmp_path / "biased", qwen, SPEC)
    with _leaves_nothing(tmp_path, CheckpointError, r"self_attention\.linear_qkv\.bias.* and 1 more.*right parent"):
        export_checkpoint(checkpoint, dense, tmp_path / "unbiased", spec=SPEC)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_what_is_no_weight_is_left_out(dense: Path, tmp_path: Path, prefix: str) -> None:
    names = [f"{kind}optimizer.state.exp_avg.decoder.layers.0.x" for kind in ("", "chained_0.", "chained_11.")]
    names.append(f"{prefix}decoder.layers.0.mlp._extra_state")
    extra = {name: torch.zeros(3) for name in names}
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC, prefix=prefix, **extra)
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
    assert is_complete(tmp_path / "hf")


def test_checkpoint_and_parent_are_never_replaced(dense: Path, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(dense, tmp_path / "run/dense"))
    checkpoint = write_checkpoint(tmp_path / "run/pretrain/ck", dense, SPEC)
    for folder in (tmp_path / "run", tmp_path / "run/pretrain", parent):
        (folder / MARKER).write_text('{"stage": "pretrain"}')
    words = "is the same folder as|lies inside|that nemo-upcycle export did not make"
    for output in ("run/pretrain", "run/pretrain/ck", "run/pretrain/ck/hf", "run/dense", "run"):
        with _leaves_nothing(tmp_path, UpcycleError, words):
            export_checkpoint(checkpoint, parent, tmp_path / output, spec=SPEC)
    with _leaves_nothing(tmp_path, UpcycleError, words):
        export_weights(LiveWeights(torch.nn.Module()), read_architecture(parent), parent, parent)
    written = []
    for _ in range(2):
        export_checkpoint(checkpoint, parent, tmp_path / "run/hf", spec=SPEC)
        written.append((tmp_path / "run/hf/model.safetensors").stat().st_ino)
    assert written[0] != written[1]


def test_a_full_disk_is_refused_and_the_earlier_export_kept(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for output in ("hf", "new"):
        with _leaves_nothing(
            tmp_path, UpcycleError, r"The disk of .* has 1000 bytes free, and .* needs at least .*Free some space"
        ):
            export_checkpoint(checkpoint, dense, tmp_path / output, spec=SPEC)
    assert is_complete(tmp_path / "hf")


@pytest.mark.parametrize(
    ("parent", "spec", "words"),
    [
        ({}, None, r"spec is missing; expected num_experts=4"),
        ({}, UpcycleSpec(num_experts=8), r"spec is num_experts=8; expected num_experts=4"),
        ({"intermediate_size": 128}, SPEC, r"w1\.weight is \[192, 64\]; expected \[256, 64\].*own parent"),
        ({"vocab_size": 400}, SPEC, r"embed_tokens\.weight is \[272, 64\]; expected \[400, 64\]"),
        ({"num_hidden_layers": 5}, SPEC, r"num_layers of .* is 4; expected 5"),
        ({"tie_word_embeddings": True}, SPEC, r"tied_embeddings of .* is False; expected True"),
    ],
)
def test_a_checkpoint_of_another_parent_or_spec_is_refused(
    saved: Path, tmp_path: Path, parent: dict[str, Any], spec: UpcycleSpec | None, words: str
) -> None:
    other = write_llama(tmp_path / "other", **({"vocab_size": 259} | parent))
    with _leaves_nothing(tmp_path, (CheckpointError, SpecError), words):
        export_checkpoint(saved / "four", other, tmp_path / "hf", spec=spec)
