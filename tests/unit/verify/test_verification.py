"""Telling what was done to a dense model: equal is equal, and what is not is named."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.verify.verification import Verification, verify
from tests.models import write_llama, write_tokenizer
from tests.parents import write_mixtral
from tests.tiers import quick


COPY = {"num_experts": 4, "top_k": 2}
FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=3))


def _made(dense: Path, folder: Path, dtype: torch.dtype | None = None, **fields: Any) -> Path:
    with open_dense(dense) as source:
        return convert(source, folder, UpcycleSpec(**(COPY | fields)), dtype=dtype).output


def _lines(found: Verification) -> dict[str, str]:
    return {group.kind: str(group).split(group.kind)[1].strip() for group in found.weights}


@pytest.mark.parametrize(
    ("fields", "down"),
    quick(
        [
            ({}, "12 of 12 identical"),
            (FINE, "0 of 24 identical; factors 2"),
            (FINE | {"shared_experts": 1}, "12 of 24 identical; factors 1, 2"),
            ({"router_order": "softmax_topk", "router_init": "zero"}, "0 of 12 identical; factors 2"),
            ({"num_experts": 6, "top_k": 4, "router_order": "softmax_topk", "router_init": "zero"}, "factors 1.5"),
            ({"moe_layers": "first-2-dense"}, "4 of 4 identical"),
        ],
        ({}, "12 of 12 identical"),
        (FINE | {"shared_experts": 1}, "12 of 24 identical; factors 1, 2"),
    ),
    ids=["copy", "granular", "shared", "before top-k", "odd", "mixed"],
)
def test_exact_models_are_equal_by_weights_and_by_logits(
    dense: Path, tmp_path: Path, fields: dict[str, Any], down: str
) -> None:
    found = verify(dense, _made(dense, tmp_path / "moe", **fields), layers=True)
    assert found.equal
    assert found.weights_exact
    assert down in _lines(found)["expert down"]
    assert _lines(found)["expert gate"].endswith("identical")
    assert found.logits is not None
    assert found.logits.relative <= 2e-6
    assert found.logits.same_argmax == 1.0
    assert found.logits.tokens == 512
    assert len(found.logits.layer_relative) == 4
    assert max(found.logits.layer_relative) < 1e-5


@pytest.mark.parametrize(
    ("fields", "kind", "line"),
    [
        ({"method": "drop", "drop_ratio": 0.25}, "expert up", "factors 1; 25 to 25 % of the neurons changed"),
        ({"method": "drop", "drop_ratio": 0.5}, "expert down", "factors 1; 50 to 50 % of the neurons changed"),
        ({"method": "noise"}, "expert gate", "100 to 100 % of the neurons changed"),
        (FINE | {"output_scale": "none"}, "expert down", "24 of 24 identical"),
        ({"router_order": "softmax_topk"}, "expert down", "0 of 12 identical; factors 2"),
    ],
    ids=["drop 25", "drop 50", "noise", "unscaled", "random before top-k"],
)
def test_what_is_not_exact_is_named(dense: Path, tmp_path: Path, fields: dict[str, Any], kind: str, line: str) -> None:
    moe = _made(dense, tmp_path / "moe", **fields)
    found = verify(dense, moe, logits=False)
    assert not found.equal
    assert line in _lines(found)[kind]
    assert not verify(dense, moe).equal


def test_a_type_with_less_precision_is_compared_in_that_type(dense: Path, tmp_path: Path) -> None:
    fields = FINE | {"num_experts": 6, "top_k": 2}
    found = verify(dense, _made(dense, tmp_path / "moe", torch.bfloat16, **fields), logits=False)
    assert found.weights_exact
    (reason,) = found.weights_rounded
    assert reason.startswith("float32 weights are rounded to bfloat16 (")
    assert not found.equal
    assert _lines(found)["everything else"].endswith("identical")


@pytest.mark.slow
@pytest.mark.skipif(version("transformers")[0] > "4", reason="its grouped products take no rows of 24 bytes")
@pytest.mark.parametrize("shared", [0, 1], ids=["mixtral", "qwen2_moe"])
def test_tokens_that_16_bits_tear_are_counted_in_the_models_own_type(dense: Path, tmp_path: Path, shared: int) -> None:
    fields = {"num_experts": 64, "top_k": 8, "granularity": 8, "shared_experts": shared}
    half = verify(dense, _made(dense, tmp_path / "half", torch.bfloat16, **fields))
    assert half.torn is not None
    assert (half.torn.dtype, half.torn.tokens) == ("bfloat16", 512)
    assert 0 < half.torn.torn == round(half.torn.share * 512) < 100


@pytest.mark.parametrize(("dtype", "tears"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_copies_of_a_parents_experts_are_torn_in_16_bits(tmp_path: Path, dtype: torch.dtype, tears: bool) -> None:
    parent = write_tokenizer(write_mixtral(tmp_path / "dense", vocab_size=259, num_local_experts=8))
    with open_dense(parent) as source:
        spec = UpcycleSpec(num_experts=16, top_k=4, router_std=0.0)
        done = convert(source, tmp_path / "moe", spec, dtype=dtype)
    assert done.needs_float32_routing
    torn = verify(parent, done.output).torn
    assert torn is not None
    assert (torn.tokens, torn.torn > 0) == (512, tears)


def test_a_granular_model_with_sigmoid_scores_is_verified(dense: Path, tmp_path: Path) -> None:
    found = verify(dense, _made(dense, tmp_path / "moe", **FINE, router_score="sigmoid"))
    assert (found.hf_class, found.equal, found.weights_exact) == ("Glm4MoeForCausalLM", True, True)
    assert found.torn is not None
    assert (found.torn.tokens, found.torn.torn) == (512, 0)
    large = _made(dense, tmp_path / "large", **FINE, router_score="sigmoid", router_std=5.0)
    assert verify(dense, large, logits=False).weights_exact is False
    torn = verify(dense, large).torn
    assert torn is not None
    assert torn.torn > 0


@pytest.mark.slow
def test_float32_and_whole_networks_tear_nothing(dense: Path, tmp_path: Path) -> None:
    single = verify(dense, _made(dense, tmp_path / "single", **FINE))
    assert single.equal
    assert single.torn is not None
    assert (single.torn.dtype, single.torn.torn) == ("float32", 0)
    assert verify(dense, tmp_path / "single", logits=False).torn is None
    assert verify(dense, _made(dense, tmp_path / "whole", torch.bfloat16)).torn is None


def test_a_model_whose_top_k_takes_half_networks_tears_every_token(dense: Path, tmp_path: Path) -> None:
    found = verify(dense, _made(dense, tmp_path / "moe", num_experts=8, top_k=3, granularity=2))
    assert found.torn is not None
    assert found.torn.share == 1.0


def test_a_foreign_top_1_model_is_compared_though_no_spec_makes_one(dense: Path, tmp_path: Path) -> None:
    for name, fields, is_exact in (("whole", {}, True), ("torn", {"num_experts": 4, "granularity": 2}, False)):
        moe = _made(dense, tmp_path / name, **fields)
        config = json.loads((moe / "config.json").read_text())
        (moe / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
        found = verify(dense, moe)
        assert found.equal is found.weights_exact is is_exact


def test_a_float16_half_that_loses_the_last_bit_of_small_weights_is_named(dense: Path, tmp_path: Path) -> None:
    half = tmp_path / "float16"
    half.mkdir()
    for path in dense.iterdir():
        (half / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    tensors["model.layers.0.mlp.down_proj.weight"][0] = 3 * 2.0**-24  # halved, it is no number of float16
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    spec = UpcycleSpec(**FINE, shared_experts=1)
    with open_dense(half) as source:
        done = convert(source, tmp_path / "moe", spec)
    why = ("the factor 0.5 on the shared experts' down projection rounds numbers below 0.00012 in float16",)
    assert (done.exact, done.inexact_because) == (False, why)
    found = verify(half, done.output, logits=False)
    assert found.weights_exact
    assert found.weights_rounded == why
    assert not found.equal
    with open_dense(half) as source:
        assert convert(source, tmp_path / "bfloat16", spec, dtype=torch.float32).exact


def test_every_type_of_a_child_is_held_against_its_parents(dense: Path, tmp_path: Path) -> None:
    moe = _made(dense, tmp_path / "moe")
    tensors = load_file(moe / "model.safetensors")
    name = "model.layers.2.input_layernorm.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    (reason,) = verify(dense, moe, logits=False).weights_rounded
    assert reason.startswith("float32 weights are rounded to bfloat16")


def _change(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "everything else"),
        ("model.layers.1.block_sparse_moe.experts.3.w2.weight", "expert down"),
    ],
)
def test_one_wrong_weight_is_found_with_its_layer(dense: Path, tmp_path: Path, name: str, kind: str) -> None:
    moe = _made(dense, tmp_path / "moe")
    _change(moe, name, 50.0)
    found = verify(dense, moe, layers=True)
    assert not found.equal
    assert not found.weights_exact
    group = next(group for group in found.weights if group.kind == kind)
    assert group.identical == group.tensors - 1
    assert found.logits is not None
    assert found.logits.layer_relative[1] < 1e-5 < found.logits.layer_relative[2]


def test_routers_that_tear_copies_apart_are_found(dense: Path, tmp_path: Path) -> None:
    moe = _made(dense, tmp_path / "moe", **FINE)
    _change(moe, "model.layers.0.block_sparse_moe.gate.weight", 1.0)
    assert not verify(dense, moe, logits=False).equal


@pytest.mark.parametrize(
    "name", ["model.layers.1.block_sparse_moe.experts.0.w2.weight", "model.layers.2.block_sparse_moe.gate.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(dense: Path, tmp_path: Path, name: str, value: float) -> None:
    moe = _made(dense, tmp_path / "moe")
    _change(moe, name, value)
    with pytest.raises(CheckpointError, match=f"{name}: got 1 values that are NaN or infinite"):
        verify(dense, moe)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_local_experts": 2},
            r"tensors not used by .*: got .*experts\.2\.w1\.weight.* tensors of MixtralForCausalLM",
        ),
        ({"num_local_experts": 6}, r"tensors missing: got .*experts\.4\.w1\.weight.* tensors of MixtralForCausalLM"),
        ({"vocab_size": 300}, "vocab_size: got 300, expected 259"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: got 5, expected at most 4"),
    ],
)
@pytest.mark.parametrize("logits", [True, False], ids=["logits", "weights only"])
def test_a_configuration_that_is_not_the_weights_own(
    dense: Path, tmp_path: Path, change: dict[str, int], words: str, logits: bool
) -> None:
    moe = _made(dense, tmp_path / "moe")
    (moe / "config.json").write_text(json.dumps(json.loads((moe / "config.json").read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        verify(dense, moe, logits=logits)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1.0])
def test_a_tolerance_is_a_number(dense: Path, tolerance: float) -> None:
    with pytest.raises(SpecError, match="tolerance: got"):
        verify(dense, dense, tolerance=tolerance)


def test_the_text_is_the_one_asked_for(dense: Path, tmp_path: Path) -> None:
    moe = _made(dense, tmp_path / "moe")
    (tmp_path / "text").write_text("some words")
    found = verify(dense, moe, tmp_path / "text")
    assert found.logits is not None
    assert found.logits.tokens == len("some words")


def test_bad_input_is_refused(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = _made(dense, tmp_path / "moe")
    other = write_tokenizer(write_llama(tmp_path / "other", vocab_size=259, layers=2))
    with pytest.raises(CheckpointError, match="num_layers: got 3, expected 2"):
        verify(other, moe)
    with pytest.raises(CheckpointError, match="give the parent's folder first"):
        verify(dense, dense)
    with pytest.raises(UpcycleError, match=r"no such file|No such file"):
        verify(dense, moe, tmp_path / "absent")
    (tmp_path / "empty").write_text("")
    with pytest.raises(UpcycleError, match="got 0 tokens"):
        verify(dense, moe, tmp_path / "empty")
    bare = write_llama(tmp_path / "bare", vocab_size=259, layers=3)
    with pytest.raises(UpcycleError, match="tokenizer: got none"):
        verify(bare, moe)
    small = write_tokenizer(write_llama(tmp_path / "small", vocab_size=100, layers=3))
    with pytest.raises(UpcycleError, match=r"tokenizer: got token 220 in the text, expected 0 to 99"):
        verify(small, _made(small, tmp_path / "small_moe"))
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "MemAvailable: 100 kB\n")
    with pytest.raises(UpcycleError, match="memory for the MoE model in float32"):
        verify_memory(4 * 10**6)


def verify_memory(needed_bytes: int) -> None:
    from nemo_upcycle.verify.verification import _require_memory

    _require_memory(needed_bytes)
