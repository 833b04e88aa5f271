"""Parents that are no Llama: what is converted, and what Megatron's layers are filled with, computes what they do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import window_fields
from nemo_upcycle.models.mapping import mapping_of
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
    write_qwen3,
    write_smollm3,
)
from tests.parents import YARN, write_gemma3, write_granite, write_granite4, write_olmo3


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
    "OLMo 3": Parent(write_olmo3, ""),
    "OLMo 3, windows everywhere": Parent(partial(write_olmo3, layer_types=["sliding_attention"] * 4), ""),
    "OLMo 3, no window": Parent(partial(write_olmo3, layer_types=["full_attention"] * 4), "FlexOlmoForCausalLM"),
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
    "OLMo 3, YaRN": Parent(partial(write_olmo3, rope_scaling=YARN | {"attention_factor": 1.2}), ""),
    "Qwen3, YaRN": Parent(partial(write_qwen3, layers=2, rope_scaling=YARN), "Qwen3MoeForCausalLM"),
    "Llama, stretched": Parent(
        partial(write_llama, layers=2, rope_scaling={"rope_type": "linear", "factor": 3.0}), "MixtralForCausalLM"
    ),
    "Gemma 3": Parent(write_gemma3, ""),
    "Granite 3": Parent(write_granite, "GraniteMoeForCausalLM"),
    "Granite 3, tied and granular": Parent(
        partial(write_granite, tied=True), "GraniteMoeForCausalLM", {"num_experts": 8, "top_k": 4, "granularity": 2}
    ),
    "Granite 3, biases": Parent(partial(write_granite, attention_bias=True), "GraniteMoeForCausalLM", online=False),
    "Granite 3, shared expert": Parent(
        write_granite, "GraniteMoeSharedForCausalLM", COPIES | {"granularity": 2, "shared_experts": 1}
    ),
    "Granite 3, sigmoid": Parent(write_granite, "", SIGMOID),
    "Granite 3, dense layer": Parent(write_granite, "", COPIES | {"moe_layers": "1"}),
    "Granite 4": Parent(write_granite4, "GraniteMoeForCausalLM"),
    "Granite 4, shared expert": Parent(
        write_granite4, "GraniteMoeSharedForCausalLM", COPIES | {"granularity": 2, "shared_experts": 1}
    ),
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
        _check_both_ways(model, [folder], tmp_path, spec)


def _another(first: Path, folder: Path) -> Path:
    shutil.copytree(first, folder)
    weights = load_file(first / "model.safetensors")
    save_file({name: weight * 0.5 + 0.01 for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    "name", ["OLMo 2", "OLMo 3", "Gemma 3", "Phi-3", "SmolLM3", "EXAONE 4", "Granite 3", "Granite 4"]
)
def test_several_parents_become_experts_in_turn(tmp_path: Path, name: str) -> None:
    write, hf_class, fields, _ = PARENTS[name]
    first = write(tmp_path / "first")
    folders, spec = [first, _another(first, tmp_path / "second")], UpcycleSpec(**fields)
    arch = read_architecture(first)
    (model,) = build_chunks(first, **moe_settings(arch, spec), **window_fields(arch))
    with open_dense(folders, non_expert_weights="mean") as dense:
        assert not upcycle_into([model], dense, spec).exact
    weights = LiveWeights(model)
    for expert, folder in enumerate(folders * 2):
        with open_dense(folder) as parent:
            wanted = parent.read(mapping_of("fc2", arch).hf[0].format(layer=1))
        assert torch.equal(weights.read(mapping_of("expert_fc2", arch), 1, expert), wanted)
    if hf_class:
        _check_both_ways(model, folders, tmp_path, spec)


def _check_both_ways(model: torch.nn.Module, folders: list[Path], output: Path, spec: UpcycleSpec) -> None:
    """Check that a filled model is exported with the bits that `convert` writes."""
    with open_dense(folders if len(folders) > 1 else folders[0], non_expert_weights="mean") as dense:
        convert(dense, output / "offline", spec, dtype=torch.float32, progress=False)
    arch = read_architecture(folders[0]).upcycled(spec)
    export_weights(LiveWeights(model), arch, folders[0], output / "online", dtype=torch.float32)
    one, other = (load_file(output / name / "model.safetensors") for name in ("offline", "online"))
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
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    (model,) = build_chunks(write_llama(tmp_path / "plain"), num_experts=None)
    with (
        open_dense(write_llama(tmp_path / "dense", rope_scaling=dynamic)) as dense,
        pytest.raises(
            CheckpointError,
            match="rope_scaling: got dynamic, expected default or linear or llama3 or yarn or longrope",
        ),
    ):
        load_dense_into([model], dense)


@pytest.mark.parametrize("former", ["su", "longrope"])
def test_both_names_of_longrope_are_one(tmp_path: Path, former: str) -> None:
    named = {"rope_scaling": LONG | {"type": former}, "original_max_position_embeddings": 16}
    scaling = read_architecture(write_phi3(tmp_path / "dense", **named)).rope_scaling
    assert scaling == LONG | {"rope_type": "longrope", "original_max_position_embeddings": 16}
