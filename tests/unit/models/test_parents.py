"""Parents that are no Llama: what is converted, and what Megatron's layers are filled with, computes what they do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import window_fields
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from nemo_upcycle.verify.verification import verify
from tests.loading.cases import logits
from tests.models import (
    build_chunks,
    moe_settings,
    sample_tokens,
    write_exaone4,
    write_llama,
    write_olmo2,
    write_phi3,
    write_smollm3,
)


COPIES = {"num_experts": 4, "top_k": 2}
SIGMOID = COPIES | {"router_score": "sigmoid", "routed_scaling_factor": 2.5}
LONG = {"short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [2.0 + n for n in range(8)]}
LONGROPE = {"rope_scaling": LONG | {"type": "longrope"}, "original_max_position_embeddings": 16}
#: The same where three quarters of a head are turned.
SHORTER = LONGROPE | {"rope_scaling": {name: values[:6] for name, values in LONG.items()} | {"type": "longrope"}}


class Parent(NamedTuple):
    """A parent, the class that holds its MoE ("": none), and whether Megatron's layers can be its.

    Args:
        write: writes a random one.
        hf_class: by transformers' name.
        spec: fields of the `UpcycleSpec`.
        online: whether a Megatron model of it can be built.
    """

    write: Callable[[Path], Path]
    hf_class: str
    spec: dict[str, Any] = COPIES
    online: bool = True


PARENTS = {
    "OLMo 2": Parent(write_olmo2, "FlexOlmoForCausalLM"),
    "OLMo 2, softmax first": Parent(
        write_olmo2, "FlexOlmoForCausalLM", COPIES | {"router_order": "softmax_topk", "router_init": "zero"}
    ),
    "OLMo 2, granular": Parent(write_olmo2, "FlexOlmoForCausalLM", {"num_experts": 8, "top_k": 4, "granularity": 2}),
    "OLMo 2, biases": Parent(partial(write_olmo2, attention_bias=True), "FlexOlmoForCausalLM", online=False),
    "OLMo 2, sigmoid": Parent(write_olmo2, "", SIGMOID),
    "OLMo 2, shared expert": Parent(write_olmo2, "", COPIES | {"granularity": 2, "shared_experts": 1}),
    "OLMo 2, dense layer": Parent(write_olmo2, "", COPIES | {"moe_layers": "1"}),
    "Phi-3": Parent(write_phi3, "MixtralForCausalLM"),
    "Phi-3, shared expert": Parent(
        write_phi3, "Qwen2MoeForCausalLM", COPIES | {"granularity": 2, "shared_experts": 1}
    ),
    "Phi-3, window": Parent(partial(write_phi3, sliding_window=5), "MixtralForCausalLM"),
    "Phi-3.5": Parent(partial(write_phi3, **LONGROPE), "MixtralForCausalLM"),
    "Phi-3.5, short": Parent(
        partial(write_phi3, **(LONGROPE | {"original_max_position_embeddings": 128, "max_position_embeddings": 512})),
        "MixtralForCausalLM",
    ),
    "SmolLM3": Parent(write_smollm3, ""),
    "SmolLM3, no layer without positions": Parent(
        partial(write_smollm3, no_rope_layers=[1] * 4), "MixtralForCausalLM"
    ),
    "EXAONE 4": Parent(write_exaone4, ""),
    "EXAONE 4, no window": Parent(partial(write_exaone4, window=None, layer_types=["full_attention"] * 4), ""),
    "Phi-4-mini": Parent(partial(write_phi3, partial_rotary_factor=0.75, tied=True, **SHORTER), ""),
    "Phi-4-mini, sigmoid": Parent(
        partial(write_phi3, partial_rotary_factor=0.75, **SHORTER), "Glm4MoeForCausalLM", SIGMOID
    ),
}


@pytest.fixture(scope="module", params=PARENTS)
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parent, Path]:
    """A parent and its folder."""
    found = PARENTS[request.param]
    return found, found.write(tmp_path_factory.mktemp("parent") / "dense")


def test_a_converted_parent_computes_what_it_did(parent: tuple[Parent, Path], tmp_path: Path) -> None:
    (_, hf_class, fields, _), folder = parent
    arch = read_architecture(folder)
    assert arch.total_params == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    with open_dense(folder) as dense:
        if not hf_class:
            with pytest.raises(SpecError, match="Hugging Face class for this MoE"):
                convert(dense, tmp_path / "moe", UpcycleSpec(**fields), progress=False)
            return
        done = convert(dense, tmp_path / "moe", UpcycleSpec(**fields), progress=False)
    assert (done.hf_class, done.exact) == (hf_class, True)
    assert verify(folder, tmp_path / "moe", logits=False).equal
    wanted, got = (logits(one, sample_tokens(250)) for one in (folder, tmp_path / "moe"))
    assert float((got - wanted).norm() / wanted.norm()) <= 2e-6


@pytest.mark.usefixtures("megatron")
def test_megatrons_layers_compute_what_a_parent_does(parent: tuple[Parent, Path], tmp_path: Path) -> None:
    (_, hf_class, fields, online), folder = parent
    arch, spec = read_architecture(folder), UpcycleSpec(**fields)
    if not online:
        return
    wanted = logits(folder, sample_tokens(250))
    window = window_fields(arch)
    (dense_model,) = build_chunks(folder, num_experts=None, **window)
    (model,) = build_chunks(folder, **moe_settings(arch, spec), **window)
    with open_dense(folder) as dense:
        assert load_dense_into([dense_model], dense).exact
        receipt = upcycle_into([model], dense, spec)
    assert receipt.exact
    assert receipt.bytes_read == receipt.bytes_needed
    with torch.no_grad():
        for made in (dense_model.eval(), model.eval()):
            got = megatron_logits(made, sample_tokens(250))[..., :250]
            assert float((got - wanted).norm() / wanted.norm()) <= 2e-6
    if hf_class:
        with open_dense(folder) as dense:
            convert(dense, tmp_path / "offline", spec, dtype=torch.float32, progress=False)
        export_weights(LiveWeights(model), arch.upcycled(spec), folder, tmp_path / "online", dtype=torch.float32)
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("offline", "online"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("megatron")
def test_norms_in_other_places_are_no_place_for_a_parents(tmp_path: Path) -> None:
    olmo2, llama = write_olmo2(tmp_path / "olmo2"), write_llama(tmp_path / "llama", layers=2)
    for folder, other in ((olmo2, llama), (llama, olmo2)):
        (model,) = build_chunks(other, num_experts=None)
        before = [parameter.clone() for parameter in model.parameters()]
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match=r"qk_layernorm|without a source"):
            load_dense_into([model], dense)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    with pytest.raises(CheckpointError, match="Fix: omit hybrid_layer_pattern"):
        megatron_fields(read_architecture(olmo2), hybrid=True)


@pytest.mark.usefixtures("megatron")
def test_longrope_needs_its_factor_and_its_frequencies(tmp_path: Path) -> None:
    folder = write_phi3(tmp_path / "dense", **LONGROPE)
    plain, fused, other = (build_chunks(folder, num_experts=None)[0] for _ in range(3))
    plain.config.yarn_mscale = 0.0
    fused.config.apply_rope_fusion = True
    other.rotary_pos_emb.inv_freq = other.rotary_pos_emb.inv_freq * 2
    words = ("yarn_mscale: got a factor of 1, expected", "apply_rope_fusion: got True", "rotary_base and RoPE scaling")
    for model, text in zip((plain, fused, other), words, strict=True):
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match=text):
            load_dense_into([model], dense)


@pytest.mark.usefixtures("megatron")
def test_a_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    (model,) = build_chunks(write_llama(tmp_path / "plain"), num_experts=None)
    with (
        open_dense(write_llama(tmp_path / "dense", rope_scaling=yarn)) as dense,
        pytest.raises(CheckpointError, match="rope_scaling: got yarn, expected default or llama3 or longrope"),
    ):
        load_dense_into([model], dense)


@pytest.mark.parametrize("former", ["su", "longrope"])
def test_both_names_of_longrope_are_one(tmp_path: Path, former: str) -> None:
    named = {"rope_scaling": LONG | {"type": former}, "original_max_position_embeddings": 16}
    scaling = read_architecture(write_phi3(tmp_path / "dense", **named)).rope_scaling
    assert scaling == LONG | {"rope_type": "longrope", "original_max_position_embeddings": 16}
