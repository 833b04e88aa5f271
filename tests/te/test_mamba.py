"""A Nemotron-H with Mamba layers is upcycled into Megatron's HybridModel, parameter by parameter, in every layout.

Mamba's kernels compute only on GPUs, so modules are built and filled here without computing. Every rank of a layout
is built under a fake process group, because filling needs no communication.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.online.receipt import UpcycleReceipt
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from tests.distributed.gather import gather, global_shards
from tests.models import write_nemotron_h


if importlib.util.find_spec("mamba_ssm") is None:
    pytest.skip("mamba-ssm is missing: run make test-in ENV=bridge", allow_module_level=True)
#: Layers of the parent, without and with the border of its pipeline stages.
PATTERN, STAGES = "M-M*-M-*-", "M-M*|-M-*-"
SPEC = UpcycleSpec(num_experts=4, top_k=2)
ONE_RANK = Layout(gpus=1)
LAYOUTS = [
    ONE_RANK,
    Layout(gpus=2, tp=2),
    Layout(gpus=2, ep=2),
    Layout(gpus=2, pp=2),
    Layout(gpus=4, tp=2, pp=2),
    Layout(gpus=4, tp=2, ep=2, etp=2),
]
SPECS = {
    "copy": SPEC,
    "granular": UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1),
    "mixed": UpcycleSpec(num_experts=4, top_k=2, moe_layers="every-2"),
    "noise": UpcycleSpec(num_experts=4, top_k=2, method="noise", noise_std=0.1),
}


@pytest.fixture(autouse=True)
def _random_numbers_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Mamba's layers draw initial numbers without CUDA's generators. The numbers are overwritten later."""
    from megatron.core.ssm import mamba_mixer

    monkeypatch.setattr(mamba_mixer, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=nullcontext))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemotron") / "dense"
    return write_nemotron_h(folder, PATTERN, use_mamba_kernels=False)


def _chunk(parent: Path, spec: UpcycleSpec | None, layout: Layout, **changes: Any) -> Any:
    """Build this rank's HybridModel from Transformer Engine's modules, as Bridge's provider does."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    from nemo_upcycle.trainers.bridge.models import upcycled_provider

    pattern = STAGES if layout.pp > 1 else PATTERN
    for layer in _moe_layers(spec):
        at = layer + ("|" in pattern[: layer + 1]) if layout.pp > 1 else layer
        pattern = pattern[:at] + "E" + pattern[at + 1 :]
    settings = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.tp > 1,
        "hybrid_layer_pattern": pattern,
        "moe_token_dispatcher_type": "allgather",  # the other dispatcher makes a tensor on the GPU
        **{"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32},
        **{"use_cpu_initialization": True, "gradient_accumulation_fusion": False},
    }
    provider = upcycled_provider(parent, spec, **settings | changes)
    provider.finalize()
    provider.hybrid_stack_spec, provider.moe_grouped_gemm = hybrid_stack_spec, spec is not None
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def _moe_layers(spec: UpcycleSpec | None) -> list[int]:
    networks = [layer for layer, kind in enumerate(PATTERN) if kind == "-"]
    pattern = spec.moe_pattern(len(networks)) if spec else []
    return [layer for layer, is_moe in zip(networks, pattern, strict=False) if is_moe]


Filled = dict[str, torch.Tensor]


def _filled(parent: Path, spec: UpcycleSpec, layout: Layout) -> tuple[Any, UpcycleReceipt]:
    """Build and fill the model of the rank that this process stands for."""
    model = _chunk(parent, spec, layout)
    with open_dense(parent) as dense:
        return model, upcycle_into([model], dense, spec)


def _gathered(parent: Path, spec: UpcycleSpec, layout: Layout) -> Filled:
    """Gather the tensors of all ranks' checkpoints."""
    shards = []
    for rank in range(layout.gpus):
        with megatron_rank(layout, rank):
            shards.append(global_shards([_filled(parent, spec, layout)[0]]))
    return gather(shards)


def _by_bridge(parent: Path) -> Filled:
    """Return the parameters of the dense model, filled by Bridge's own loader on one rank."""
    from megatron.bridge import AutoBridge

    with megatron_rank(ONE_RANK, 0):
        model = _chunk(parent, None, ONE_RANK)
        AutoBridge.from_hf_pretrained(str(parent)).load_hf_weights([model])
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _as_experts(dense: Filled, layers: list[int], experts: int) -> Filled:
    """Return the tensors named as if the given layers had copies of their network as experts."""
    found = dict(dense)
    for layer in layers:
        inside = f"decoder.layers.{layer}."
        found[inside + "pre_mlp_layernorm.weight"] = found.pop(inside + "mlp.linear_fc1.layer_norm_weight")
        for name in ("linear_fc1.weight", "linear_fc2.weight"):
            weight = found.pop(inside + "mlp." + name)
            found |= {inside + f"mlp.experts.{name}{expert}": weight for expert in range(experts)}
    return found


def test_a_model_has_copies_of_the_parents_networks(parent: Path) -> None:
    with megatron_rank(ONE_RANK, 0):
        filled = dict(_filled(parent, SPEC, ONE_RANK)[0].named_parameters())
    expected = _as_experts(_by_bridge(parent), _moe_layers(SPEC), SPEC.num_experts)
    routers = {name for name in filled if name.endswith("mlp.router.weight")}
    assert len(routers) == PATTERN.count("-")
    assert filled.keys() - routers == expected.keys()
    assert not any(filled[name].isnan().any() for name in routers)
    for name, tensor in expected.items():
        assert torch.equal(filled[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*(("copy", layout) for layout in LAYOUTS[1:-1]), *((kind, LAYOUTS[-1]) for kind in SPECS)],
    ids=str,
)
def test_every_layout_has_the_bits_of_one_rank(parent: Path, kind: str, layout: Layout) -> None:
    spec = SPECS[kind]
    whole, cut = _gathered(parent, spec, ONE_RANK), _gathered(parent, spec, layout)
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor), name
    moe_layers = {int(re.findall(r"\d+", name)[0]) for name in whole if "router" in name}
    assert moe_layers == set(_moe_layers(spec))


def test_the_provider_has_bridges_own_settings_of_the_function(parent: Path) -> None:
    from megatron.bridge import AutoBridge

    from nemo_upcycle.trainers.bridge.models import upcycled_provider

    theirs, ours = AutoBridge.from_hf_pretrained(str(parent)).to_megatron_provider(), upcycled_provider(parent, None)
    for name in (
        *("hybrid_layer_pattern", "position_embedding_type", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
        *("num_query_groups", "kv_channels", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups"),
        *("mamba_state_dim", "gated_linear_unit", "activation_func", "add_bias_linear", "layernorm_epsilon"),
        *("normalization", "vocab_size", "share_embeddings_and_output_weights"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_the_builders_configuration_is_the_same(parent: Path) -> None:
    from nemo_upcycle.trainers.bridge.models import upcycled_config, upcycled_provider

    provider, config = upcycled_provider(parent, SPEC), upcycled_config(parent, SPEC)
    assert provider.hybrid_layer_pattern == config.hybrid_layer_pattern == "MEM*EME*E"
    assert config.position_embedding_type == "none"
    for name in ("num_layers", "mamba_num_heads", "mamba_num_groups", "activation_func", "moe_layer_freq"):
        assert getattr(config.transformer, name) == getattr(provider, name), name


def test_the_receipt_counts_mambas_parameters(parent: Path) -> None:
    with megatron_rank(ONE_RANK, 0):
        model, receipt = _filled(parent, SPEC, ONE_RANK)
    assert receipt.total_params == sum(parameter.numel() for parameter in model.parameters())
    with SafetensorsFolder(parent) as folder:
        assert receipt.dense_params == sum(folder.read(name).numel() for name in folder.names())
    assert receipt.exact
    assert receipt.bytes_read == receipt.bytes_needed
    (record,) = (one for one in receipt.parameters if one.name == "decoder.layers.0.mixer.conv1d_weight")
    assert [source.partition("[")[2] for source in record.sources] == [
        *("0:128, 0:1, 0:4]", "128:144, 0:1, 0:4]", "144:160, 0:1, 0:4]")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_layer_pattern": "ME*EM-ME*"}, "hybrid_layer_pattern is ME.EM-ME.; expected ME.EMEME."),
        ({"hybrid_layer_pattern": "MEM*EME*M"}, r"expected MEM.EME.E \(as in the parent"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is rope; expected none"),
        ({"mamba_num_groups": 1, "mamba_state_dim": 16}, "mamba_num_groups is 1; expected 2"),
    ],
    ids=["dense layer", "other layers", "positions", "groups"],
)
def test_a_model_that_computes_otherwise_is_refused_by_name(parent: Path, changes: dict, message: str) -> None:
    with megatron_rank(ONE_RANK, 0):
        changes.setdefault("hybrid_layer_pattern", "MEM*EME*E")
        model = _chunk(parent, SPEC, ONE_RANK, **changes)
        with open_dense(parent) as dense, pytest.raises(UpcycleError, match=message):
            upcycle_into([model], dense, SPEC)
    assert all(parameter.isnan().all() for parameter in model.parameters())
