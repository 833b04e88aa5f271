"""`nemo-upcycle plan --model` with checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.hf_config import read_architecture
from tests.unit.cli.conftest import Command, refused
from tests.unit.convert.exports import write_checkpoint
from tests.unit.sources.test_checkpoint_context import _megatron


FINE = UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1, router_order="softmax_topk")
#: The model section of Megatron-Bridge's `run_config.yaml`.
BRIDGE: dict[str, Any] = {
    **{"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", "num_layers": 2, "hidden_size": 64},
    **{"activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False, "_partial_": False}},
    **{"ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16},
    **{"gated_linear_unit": True, "normalization": "RMSNorm", "layernorm_epsilon": 1e-5},
    **{"position_embedding_type": "rope", "rotary_base": 100000, "seq_length": 128, "vocab_size": 259},
    **{"num_moe_experts": 8, "moe_router_topk": 4, "moe_router_pre_softmax": True, "moe_layer_freq": 1},
    **{"moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 48},
}


def _bridge(folder: Path, dense: Path, **changes: Any) -> Path:
    """Write a checkpoint as Bridge does, with `run_config.yaml` beside the weights."""
    weights = write_checkpoint(folder, dense, FINE, prefix="") / "weights"
    (weights / "run_config.yaml").write_text(yaml.safe_dump({"model": BRIDGE | changes}))
    return weights


def test_a_checkpoint_is_planned_as_its_own_configuration_says(dense: Path, tmp_path: Path, command: Command) -> None:
    arch = read_architecture(dense)
    for folder, spec in (
        (_megatron(tmp_path / "megatron", dense), UpcycleSpec(num_experts=4, top_k=2)),
        (_bridge(tmp_path / "bridge", dense), FINE),
    ):
        for name in (str(folder), f"nemo://{folder}"):
            step = ("--seq-length", "128", "--global-batch", "8")
            found = command.values("plan", "--model", name, "--gpus", "1", *step)["model"]
            expected = arch.upcycled(spec)
            assert (found["total_params"], found["active_params"]) == (expected.total_params, expected.active_params)


def test_refuses_a_checkpoint_with_unsupported_settings_by_name(dense: Path, tmp_path: Path) -> None:
    folder = _bridge(tmp_path / "bridge", dense, experimental_attention_variant="dsa")
    typed = ("plan", "--model", str(folder), "--gpus", "1")
    assert refused(*typed).got == "dsa"
    (folder / "run_config.yaml").unlink()
    assert "does not describe its model: no context/model.yaml" in str(refused(*typed))
