"""Real Transformer Engine modules are filled bit-identically to Megatron's own modules, one by one.

Every rank of a layout is built under a fake process group, because filling needs no communication. `tests/unit` and
`tests/distributed` test that Megatron's own modules have the right bits in every layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hybrid import hybrid_pattern, layer_parts
from nemo_upcycle.models.mapping import find_mapping
from nemo_upcycle.models.mapping_table import MAPPINGS
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.planning.layout import Layout
from tests.distributed.gather import global_shards
from tests.models import MemorySource, build_chunks, moe_settings, small_architecture


SPEC = UpcycleSpec(num_experts=4, top_k=2)
ONE_RANK = Layout(gpus=1)
LAYOUTS = [
    ONE_RANK,
    Layout(gpus=2, tp=2),
    Layout(gpus=2, ep=2),
    Layout(gpus=2, etp=2),
    Layout(gpus=2, pp=2),
    Layout(gpus=2, pp=2, vp=2),
    Layout(gpus=4, tp=2, ep=2, etp=2),
    Layout(gpus=4, tp=2, ep=4),
    Layout(gpus=8, tp=2, pp=2, vp=2, ep=2, etp=2),
]
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({"tied_embeddings": True}, {}),
    "qk_norm": ({"hf_class": "Qwen3ForCausalLM", "qk_norm": True, "tied_embeddings": True}, {}),
    "biases": ({"qkv_bias": True, "attention_out_bias": True, "ffn_bias": True}, {}),
    "gelu": ({"gated": False, "activation": "gelu"}, {}),
    "granular": ({}, {"num_experts": 8, "top_k": 4, "granularity": 2}),
    "shared": ({}, {"num_experts": 8, "top_k": 4, "granularity": 2, "shared_experts": 1}),
    "mixed_shared": ({}, {"moe_layers": (0, 3), "num_experts": 8, "granularity": 2, "shared_experts": 2}),
    "noise": ({}, {"method": "noise", "noise_std": 0.1}),
    "drop": ({}, {"method": "drop"}),
}
RECIPES = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}
GROUPED = pytest.mark.parametrize("grouped", [True, False], ids=["TEGroupedMLP", "SequentialMLP"])


def kind_of(model: str) -> tuple[Architecture, UpcycleSpec]:
    """Return the shapes and the spec of a model in `MODELS`, or of the plain model."""
    shapes, fields = MODELS.get(model, ({}, {}))
    return small_architecture(num_layers=4, **shapes), UpcycleSpec(**({"num_experts": 4, "top_k": 2} | fields))


def _local(arch: Architecture, spec: UpcycleSpec | None, layout: Layout) -> list[Any]:
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "vp", "ep", "etp")}
    return build_chunks(arch, layout=sizes, **(moe_settings(arch, spec) if spec else {"num_experts": None}))


def _with_te(chunks: list[Any], **changes: Any) -> list[Any]:
    """Build the same chunks from Transformer Engine's modules."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    chunks_te = []
    for chunk in chunks:
        config = replace(chunk.config, **changes)
        # This uses get_gpt_layer_with_transformer_engine_spec for every layer, with or without experts.
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=chunk.vp_stage)
        chunks_te.append(GPTModel(config, layers, **_rest(chunk)))
    return chunks_te


def _rest(chunk: Any) -> dict[str, Any]:
    """Return the arguments for a model that replaces a chunk, except the configuration and layers."""
    names = ("vocab_size", "max_sequence_length", "pre_process", "post_process", "rotary_base", "vp_stage")
    names += ("share_embeddings_and_output_weights",)
    return {"position_embedding_type": "rope"} | {name: getattr(chunk, name) for name in names}


def _filled(chunks: list[Any], source: MemorySource, spec: UpcycleSpec | None) -> dict[Any, torch.Tensor]:
    """Set chunks to NaN, fill them, and return their parameters by role, layer and local expert."""
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        parameter.data.fill_(float("nan"))
    if spec:
        upcycle_into(chunks, source, spec)
    else:
        load_dense_into(chunks, source)
    found = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            layer, inner = None, name
            if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
                layer, inner = layer_parts(chunk)[int(match[1])].layer + 1, match[2]
            mapping_and_expert = find_mapping(inner, in_layer=layer is not None)
            assert mapping_and_expert, name
            assert not parameter.isnan().any(), f"{name} was not filled"
            found[mapping_and_expert[0].role, layer, mapping_and_expert[1]] = parameter.detach()
    assert len(found) == sum(len(list(chunk.parameters())) for chunk in chunks)
    return found


def _check_same(arch: Architecture, spec: UpcycleSpec | None, layout: Layout, build: Callable[..., list[Any]]) -> None:
    """Check that the chunks from `build` are filled with the same bits as a rank's local modules."""
    source = MemorySource(arch)
    for rank in range(layout.gpus):
        with megatron_rank(layout, rank):
            local = _local(arch, spec, layout)
            chunks = build(local)
            wanted, got = _filled(local, source, spec), _filled(chunks, source, spec)
        assert got.keys() == wanted.keys()
        for key, parameter in got.items():
            assert torch.equal(parameter, wanted[key]), f"rank {rank}: {key}"


def _checked(local: list[Any], grouped: bool, **changes: Any) -> list[Any]:
    """Build Transformer Engine's modules, and check that they have the classes under test."""
    import transformer_engine.pytorch as te
    from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

    chunks = _with_te(local, moe_grouped_gemm=grouped, **changes)
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        assert isinstance(layer.self_attention.linear_qkv, te.LayerNormLinear)
        if experts := getattr(layer.mlp, "experts", None):
            assert type(experts) is (TEGroupedMLP if grouped else SequentialMLP)
            linear = experts.linear_fc1 if grouped else experts.local_experts[0].linear_fc1
            assert isinstance(linear, te.GroupedLinear if grouped else te.Linear)
        else:
            assert isinstance(layer.mlp.linear_fc1, te.LayerNormLinear)
    return chunks


#: Every kind of model on three layouts, and the plain model on all layouts.
KINDS = [
    *(("plain", layout) for layout in LAYOUTS),
    *((model, layout) for model in MODELS for layout in (ONE_RANK, Layout(gpus=4, tp=2, pp=2, ep=2), LAYOUTS[6])),
]


@GROUPED
@pytest.mark.parametrize(("model", "layout"), KINDS, ids=str)
def test_every_kind_of_model(model: str, layout: Layout, grouped: bool) -> None:
    arch, spec = kind_of(model)
    if arch.ffn_bias and layout.etp > 1:
        pytest.skip("Megatron-Core has biases of experts only without expert-tensor parallelism")
    _check_same(arch, spec, layout, partial(_checked, grouped=grouped))


def _as_hybrid(chunks: list[Any], arch: Architecture, spec: UpcycleSpec | None, layout: Layout) -> list[Any]:
    """Build the same chunks as parts of a HybridModel with Transformer Engine's modules."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from nemo_upcycle.trainers.bridge.models import hybrid_stack_with_qk_norm

    moe = arch.upcycled(spec) if spec else arch
    pattern = hybrid_pattern([moe.is_moe_layer(layer) for layer in range(arch.num_layers)], layout.pp * layout.vp)
    fields = megatron_fields(moe, hybrid=True)
    sizes = {name: fields[name] for name in ("num_layers", "moe_layer_freq") if name in fields}
    return [
        HybridModel(
            replace(chunk.config, moe_grouped_gemm=spec is not None, **sizes),
            hybrid_stack_with_qk_norm() if arch.qk_norm else hybrid_stack_spec,
            hybrid_layer_pattern=pattern,
            **_rest(chunk),
        )
        for chunk in chunks
    ]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("granular", layout) for layout in LAYOUTS),
        *((model, Layout(gpus=4, tp=2, pp=2, ep=2)) for model in ("qk_norm", "mixed_shared", "biases", "gelu")),
    ],
    ids=str,
)
def test_a_hybrid_model_has_the_bits_of_a_gpt_model(model: str, layout: Layout) -> None:
    pytest.importorskip("megatron.bridge", reason="Megatron-Core 0.15 has no HybridModel")
    arch, spec = kind_of(model)
    _check_same(arch, spec, layout, lambda local: _as_hybrid(local, arch, spec, layout))


@GROUPED
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_changes_no_parameter(recipe: str, grouped: bool) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    arch, layout = small_architecture(num_layers=4), Layout(gpus=4, tp=2, ep=2)
    fp8 = {"fp8": "hybrid", "fp8_recipe": recipe}
    _check_same(arch, SPEC, layout, partial(_checked, grouped=grouped, **fp8))
    with megatron_rank(layout, 0):
        (chunk,) = _with_te(_local(arch, SPEC, layout), moe_grouped_gemm=grouped, **fp8)
    assert RECIPES[recipe] in [kind.__name__ for kind in type(get_fp8_recipe(chunk.config)).__mro__]


def _saved(chunk: Any) -> dict[Any, torch.Tensor]:
    """Return the tensors of a chunk that Megatron saves, by role, layer and offset in the whole tensor."""
    saved = {}
    for key, offset, data in global_shards([chunk]):
        in_layer = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.*)", key)
        layer, name = in_layer.groups() if in_layer else (None, key)
        (role,) = (mapping.role for mapping in MAPPINGS if name in mapping.stored)
        saved[role, layer, offset] = data
    return saved


@GROUPED
@pytest.mark.parametrize("model", ["shared", "mixed_shared", "biases"])
def test_a_checkpoint_has_the_same_tensors(model: str, grouped: bool) -> None:
    """The mapping table finds tensors of Transformer Engine's modules and of the local spec alike."""
    arch, spec = kind_of(model)
    layout, source = Layout(gpus=4, tp=2, ep=2), MemorySource(arch)
    with megatron_rank(layout, 3):
        local = _local(arch, spec, layout)
        chunks = _with_te(local, moe_grouped_gemm=grouped)
        _filled(local, source, spec)
        _filled(chunks, source, spec)
        wanted, got = _saved(local[0]), _saved(chunks[0])
    assert got.keys() == wanted.keys()
    for key, data in got.items():
        assert torch.equal(data, wanted[key]), key


def test_a_dense_model() -> None:
    arch = small_architecture(num_layers=4)
    _check_same(arch, None, Layout(gpus=4, tp=2, pp=2), partial(_checked, grouped=False))
