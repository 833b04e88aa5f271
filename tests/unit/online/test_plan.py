"""For any model shape and layout, every rank fills every element of its parameters with the right value.

Real Megatron modules are built for each rank of a cluster in turn, under a process group that sends nothing. The test
computes the right values a second time, as simply as possible, from Megatron's documented layouts.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.sharding import Shard
from nemo_upcycle.online.plan import RankCoords
from nemo_upcycle.planning.layout import Layout
from tests.models import MemorySource, build_chunks, moe_settings, small_architecture


def _ranks(layout: dict[str, int]) -> int:
    return layout["pp"] * math.lcm(layout["tp"], layout["ep"] * layout["etp"])


def _coords(rank: int, layout: dict[str, int]) -> RankCoords:
    """Return a rank's coordinates: in Megatron's order, tensor parallelism varies fastest, then expert parallelism."""
    tp, etp, ep = layout["tp"], layout["etp"], layout["ep"]
    return RankCoords(Shard(rank % tp, tp), Shard(rank % etp, etp), Shard(rank // etp % ep, ep))


@st.composite
def _clusters(draw: st.DrawFn) -> tuple[Architecture, UpcycleSpec, dict[str, int]]:
    """Draw a dense model, a spec and a layout; tests/distributed/test_upcycle.py covers uneven stages."""
    sizes = {"tp": [1, 2, 4], "pp": [1, 2, 3], "vp": [1, 2], "ep": [1, 2, 4], "etp": [1, 2]}
    layout = {name: draw(st.sampled_from(values)) for name, values in sizes.items()}
    if layout["pp"] == 1 or _ranks(layout) > 16:
        layout |= {"vp": 1, "pp": min(layout["pp"], 2)}
    granularity = draw(st.integers(1, 3))
    experts = math.lcm(granularity, layout["ep"]) * draw(st.integers(1, 2))
    experts = experts if experts > 1 else 2
    biases = layout["etp"] == 1 and draw(st.booleans())  # Megatron requires etp=1 for biases
    layers = layout["pp"] * layout["vp"] * draw(st.integers(1, 2))
    kv_heads = layout["tp"] * draw(st.integers(1, 2))
    arch = small_architecture(
        num_layers=layers,
        hidden_size=draw(st.sampled_from([3, 8])),
        ffn_size=granularity * math.lcm(layout["tp"], layout["etp"]) * draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=2,
        vocab_size=draw(st.integers(3, 40)),
        tied_embeddings=draw(st.booleans()),
        gated=draw(st.booleans()),
        qkv_bias=biases or draw(st.booleans()),
        attention_out_bias=biases,
        ffn_bias=biases,
        **({"hf_class": "Qwen3ForCausalLM", "qk_norm": True} if not biases and draw(st.booleans()) else {}),
    )
    numbers = st.sets(st.integers(0, layers - 1), min_size=1).map(tuple)
    spec = UpcycleSpec(
        num_experts=experts,
        top_k=draw(st.integers(2, experts)),
        granularity=granularity,
        shared_experts=0 if biases else draw(st.integers(0, granularity)),
        moe_layers=draw(st.one_of(st.just("all"), st.just("every-2"), numbers)),
    )
    return arch, spec, layout


def _wanted(name: str, layer: int, dense: MemorySource, spec: UpcycleSpec, coords: RankCoords) -> torch.Tensor:
    """Return the values that a parameter must hold; the vocabulary is neither padded nor sharded."""
    arch, tensors, kind = dense.architecture, dense.tensors, name.rpartition(".")[2]

    def hf(inner: str) -> torch.Tensor:
        return tensors[f"model.layers.{layer}.{inner}"]

    if "embedding" in name or "output_layer" in name:
        is_output = "output" in name and not arch.tied_embeddings
        return tensors["lm_head.weight" if is_output else "model.embed_tokens.weight"]
    if match := re.search("([qk])_layernorm", name):
        return hf(f"self_attn.{match[1]}_norm.weight")
    if "norm" in name:
        inner = "input_layernorm" if "input" in name else "post_attention_layernorm"
        return tensors["model.norm.weight"] if "final" in name else hf(f"{inner}.weight")
    if "linear_qkv" in name:
        by_group = [hf(f"self_attn.{part}_proj.{kind}").unflatten(0, (arch.num_kv_heads, -1)) for part in "qkv"]
        return torch.cat(by_group, 1).flatten(0, 1).chunk(coords.dense.size)[coords.dense.rank]
    if "linear_proj" in name:
        whole = hf(f"self_attn.o_proj.{kind}")
        return whole if kind == "bias" else whole.chunk(coords.dense.size, 1)[coords.dense.rank]
    if "router" in name:
        return router_weight(spec, layer, arch.hidden_size) if kind == "weight" else torch.zeros(spec.num_experts)
    width = arch.ffn_size // spec.granularity
    if match := re.search(r"local_experts\.(\d+)", name):
        expert = coords.experts.rank * spec.num_experts // coords.experts.size + int(match[1])
        first = expert % spec.granularity * width
        neurons, shard = slice(first, first + width), coords.expert
        scale = spec.granularity * (0.5 if expert % spec.granularity < spec.shared_experts else 1.0)
    elif "shared" in name:
        neurons, shard, scale = slice(0, spec.shared_experts * width), coords.dense, 0.5
    else:
        neurons, shard, scale = slice(None), coords.dense, 1.0
    if "fc1" in name:
        parts = [hf(f"mlp.{part}_proj.{kind}") for part in (("gate", "up") if arch.gated else ("up",))]
        return torch.cat([part[neurons].chunk(shard.size)[shard.rank] for part in parts])
    down = hf(f"mlp.down_proj.{kind}")
    return down if kind == "bias" else down[:, neurons].chunk(shard.size, 1)[shard.rank] * scale


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cluster=_clusters())
def test_every_rank_of_any_cluster_gets_what_belongs_there(cluster: Any) -> None:
    arch, spec, layout = cluster
    drawn = {"use_cpu_initialization": False, "perform_initialization": False}
    event(f"{_ranks(layout)} ranks")
    dense = MemorySource(arch)
    for rank in range(_ranks(layout)):
        with megatron_rank(Layout(gpus=_ranks(layout), **layout), rank):
            chunks = build_chunks(arch, layout=layout, **moe_settings(arch, spec), **drawn)
            coords = _coords(rank, layout)
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data.fill_(float("nan"))
            upcycle_into(chunks, dense, spec)
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    local = re.match(r"decoder\.layers\.(\d+)\.", name)
                    layer = chunk.decoder.layers[int(local[1])].layer_number - 1 if local else -1
                    wanted = _wanted(name, layer, dense, spec, coords)
                    if local is None and "norm" not in name:
                        padded = len(parameter) * coords.dense.size - len(wanted)
                        wanted = torch.nn.functional.pad(wanted, (0, 0, 0, padded))
                        wanted = wanted.chunk(coords.dense.size)[coords.dense.rank]
                    assert torch.equal(parameter, wanted), f"{name} on rank {rank}"


def test_an_output_layer_that_the_model_lacks_is_missed() -> None:
    """A tied model would silently drop the output layer of an untied checkpoint."""
    with megatron_rank(Layout(gpus=1), 0):
        chunks = build_chunks(small_architecture(tied_embeddings=True), num_experts=8)
        with pytest.raises(CheckpointError, match="The model has no output_layer\\.weight"):
            upcycle_into(chunks, MemorySource(small_architecture()), UpcycleSpec())


def test_parameters_that_are_no_plain_tensors_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    arch = small_architecture()
    with megatron_rank(Layout(gpus=1), 0):
        chunks = build_chunks(arch, num_experts=4)
        norm = chunks[0].decoder.final_layernorm
        norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.data, init_device_mesh("cpu", (1,))))
        with pytest.raises(SpecError, match=r"final_layernorm\.weight.*DTensor"):
            upcycle_into(chunks, MemorySource(arch), UpcycleSpec(num_experts=4, top_k=2))
