"""`verify` compares a model with its dense parent: equal models pass, and every difference is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert import verification
from nemo_upcycle.convert.verification import Verification, verify
from nemo_upcycle.errors import CheckpointError, UpcycleError
from tests.folders import change_config, change_weights, converted
from tests.models import weights_of, write_llama, write_tokenizer
from tests.parents import write_mixtral
from tests.tiers import quick


COPY = {"num_experts": 4, "top_k": 2}
FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}
SHARED = FINE | {"shared_experts": 1, "routed_scaling_factor": 2.5}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=3))


def _made(dense: Path, folder: Path, dtype: torch.dtype | None = None, **fields: Any) -> Path:
    return converted(dense, folder, UpcycleSpec(**(COPY | fields)), dtype=dtype).output


def _lines(found: Verification) -> dict[str, str]:
    return {group.kind: str(group).split(group.kind)[1].strip() for group in found.weights}


@pytest.mark.parametrize(
    ("fields", "down"),
    quick(
        [
            ({}, "12 of 12 identical"),
            (FINE, "0 of 24 identical; factors 2"),
            (SHARED, "12 of 24 identical; factors 1, 2"),
            (FINE | {"router_score": "sigmoid"}, "0 of 24 identical; factors 2"),
            ({"router_order": "softmax_topk", "router_init": "zero"}, "0 of 12 identical; factors 2"),
            ({"num_experts": 6, "top_k": 4, "router_order": "softmax_topk", "router_init": "zero"}, "factors 1.5"),
            ({"moe_layers": "first-2-dense"}, "4 of 4 identical"),
        ],
        ({}, "12 of 12 identical"),
        (SHARED, "12 of 24 identical; factors 1, 2"),
    ),
    ids=["copy", "granular", "shared", "sigmoid", "before top-k", "odd", "mixed"],
)
def test_exact_models_are_equal_by_weights_and_logits(dense: Path, tmp_path: Path, fields: Any, down: str) -> None:
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


def test_experts_that_no_grouped_product_takes_are_compared(tmp_path: Path) -> None:
    dense = write_tokenizer(write_llama(tmp_path / "dense", vocab_size=259, layers=1, intermediate_size=90))
    assert verify(dense, _made(dense, tmp_path / "moe", **FINE)).equal  # rows of 45 float32 numbers: 180 bytes


@pytest.mark.parametrize(
    ("fields", "kind", "line"),
    [
        ({"method": "drop", "drop_ratio": 0.25}, "expert up", "factors 1; 25 to 25 % of the neurons changed"),
        ({"method": "noise"}, "expert gate", "100 to 100 % of the neurons changed"),
        (FINE | {"output_scale": "none"}, "expert down", "24 of 24 identical"),
        ({"router_order": "softmax_topk"}, "expert down", "0 of 12 identical; factors 2"),
    ],
    ids=["drop", "noise", "unscaled", "random before top-k"],
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
@pytest.mark.parametrize(
    ("fields", "torn"),
    [
        pytest.param(FINE, range(1), id="exact", marks=pytest.mark.full),
        pytest.param(FINE | {"router_score": "sigmoid", "router_std": 5.0}, range(1, 513), id="large logits"),
        pytest.param(FINE | {"top_k": 3}, range(512, 513), id="half networks", marks=pytest.mark.full),
    ],
)
def test_tokens_of_torn_networks_are_counted(dense: Path, tmp_path: Path, fields: dict[str, Any], torn: range) -> None:
    found = verify(dense, _made(dense, tmp_path / "moe", **fields)).torn
    assert found is not None
    assert found.torn in torn
    assert found.torn == round(found.share * 512)
    assert verify(dense, _made(dense, tmp_path / "copies")).torn is None


@pytest.mark.parametrize(("dtype", "tears"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_copies_of_a_parents_experts_are_torn_in_16_bits(tmp_path: Path, dtype: torch.dtype, tears: bool) -> None:
    parent = write_tokenizer(write_mixtral(tmp_path / "dense", vocab_size=259, num_local_experts=8))
    done = converted(parent, tmp_path / "moe", UpcycleSpec(num_experts=16, top_k=4, router_std=0.0), dtype=dtype)
    assert done.needs_float32_routing
    torn = verify(parent, done.output).torn
    assert torn is not None
    assert (torn.dtype, torn.tokens, torn.torn > 0) == (str(dtype).removeprefix("torch."), 512, tears)


def test_compares_a_foreign_top_1_model(dense: Path, tmp_path: Path) -> None:
    for name, fields, is_exact in (("whole", {}, True), ("torn", {"num_experts": 4, "granularity": 2}, False)):
        moe = _made(dense, tmp_path / name, **fields)
        found = verify(dense, change_config(moe, num_experts_per_tok=1))
        assert found.equal is found.weights_exact is is_exact


def test_float16_that_rounds_small_weights_is_named(dense: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in weights_of(dense).items()}
    # Half of this number is not representable in float16.
    tensors["model.layers.0.mlp.down_proj.weight"][0] = 3 * 2.0**-24
    half = change_weights(Path(shutil.copytree(dense, tmp_path / "float16")), tensors)
    spec = UpcycleSpec(**FINE, shared_experts=1)
    done = converted(half, tmp_path / "moe", spec)
    why = ("the factor 0.5 on the shared experts' down projection rounds numbers below 0.00012 in float16",)
    assert (done.exact, done.inexact_because) == (False, why)
    found = verify(half, done.output, logits=False)
    assert found.weights_exact
    assert found.weights_rounded == why
    assert not found.equal
    assert converted(half, tmp_path / "float32", spec, dtype=torch.float32).exact


def test_every_type_of_a_child_is_held_against_its_parents(dense: Path, tmp_path: Path) -> None:
    moe = _made(dense, tmp_path / "moe")
    name = "model.layers.2.input_layernorm.weight"
    change_weights(moe, {name: weights_of(moe)[name].bfloat16()})
    (reason,) = verify(dense, moe, logits=False).weights_rounded
    assert reason.startswith("float32 weights are rounded to bfloat16")


def _change(folder: Path, name: str, value: float) -> None:
    tensor = weights_of(folder)[name]
    tensor.view(-1)[-1] = value
    change_weights(folder, {name: tensor})


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


@pytest.mark.parametrize("name", ["1.block_sparse_moe.experts.0.w2.weight", "2.block_sparse_moe.gate.weight"])
def test_weights_that_are_no_numbers_are_named(dense: Path, tmp_path: Path, name: str) -> None:
    moe = _made(dense, tmp_path / "moe")
    _change(moe, f"model.layers.{name}", float("nan"))
    with pytest.raises(CheckpointError, match=rf"{name} has NaN or infinite values \(1\)"):
        verify(dense, moe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_local_experts": 2}, r"has tensors that \w+ does not have: .*experts\.2\.w1\.weight"),
        ({"num_local_experts": 6}, r"lacks tensors: .*experts\.4\.w1\.weight"),
        ({"vocab_size": 300}, "vocab_size is 300; expected 259"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; expected "),
    ],
)
def test_a_config_that_is_not_the_weights(dense: Path, tmp_path: Path, change: Any, said: str) -> None:
    moe = change_config(_made(dense, tmp_path / "moe"), **change)
    with pytest.raises(CheckpointError, match=said):
        verify(dense, moe)


def test_another_parent_and_another_tokenizer_are_refused(dense: Path, tmp_path: Path) -> None:
    moe = _made(dense, tmp_path / "moe")
    bare = write_llama(tmp_path / "bare", vocab_size=259, layers=3)
    small = write_tokenizer(write_llama(tmp_path / "small", vocab_size=100, layers=3))
    other = write_tokenizer(write_llama(tmp_path / "other", vocab_size=259, layers=2))
    for parent, child, said in (
        (other, moe, f"{moe}: num_layers is 3; expected 2"),
        (dense, dense, f"{dense} is a LlamaForCausalLM, which has no experts"),
        (bare, moe, f"Folder {bare} has no tokenizer"),
        (
            small,
            _made(small, tmp_path / "small_moe"),
            f"Tokenizer of {small} makes token 220, but the model has only 100",
        ),
    ):
        with pytest.raises(UpcycleError, match=re.escape(said)):
            verify(parent, child)


def test_a_model_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "MemAvailable: 100 kB\n")
    with pytest.raises(UpcycleError, match=r"GiB of memory free, and the MoE in float32 needs \d"):
        verification._require_memory(4 * 10**6)
