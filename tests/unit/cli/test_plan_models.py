"""`nemo-upcycle plan --model`: models of other kinds, and checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.hf_config import read_architecture
from tests.models import write_llama
from tests.unit.cli.test_plan import _config, _json, _refusal, _run
from tests.unit.convert.exports import write_checkpoint
from tests.unit.sources.test_checkpoint_context import _megatron


FINE = UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1, router_order="softmax_topk")
#: What `run_config.yaml` of Megatron-Bridge says of a model.
BRIDGE: dict[str, Any] = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False, "_partial_": False},
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "rotary_base": 100000,
    "seq_length": 128,
    "vocab_size": 250,
    "num_moe_experts": 8,
    "moe_router_topk": 4,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "moe_layer_freq": 1,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense"), layers=2, attention_bias=False)


def _bridge(folder: Path, dense: Path, **changes: Any) -> Path:
    """Write a checkpoint as Bridge keeps it: `run_config.yaml` beside the weights."""
    weights = write_checkpoint(folder, dense, FINE, prefix="") / "weights"
    (weights / "run_config.yaml").write_text(yaml.safe_dump({"model": BRIDGE | changes}))
    return weights


def test_a_checkpoint_is_planned_as_its_own_configuration_says(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = read_architecture(dense)
    for folder, spec in (
        (_megatron(tmp_path / "megatron", dense), UpcycleSpec(num_experts=4, top_k=2)),
        (_bridge(tmp_path / "bridge", dense), FINE),
    ):
        for name in (str(folder), f"nemo://{folder}"):
            found = _json(capsys, "--model", name, "--gpus", "1", "--seq-length", "128", "--global-batch", "8")
            expected = arch.upcycled(spec)
            counts = (found["model"]["total_params"], found["model"]["active_params"])
            assert counts == (expected.total_params, expected.active_params)


def test_a_checkpoint_of_what_is_not_modelled_is_refused_by_name(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _bridge(tmp_path / "bridge", dense, experimental_attention_variant="gated_delta_net")
    assert "experimental_attention_variant: got gated_delta_net, expected None" in _refusal(
        capsys, "--model", str(folder), "--gpus", "1"
    )
    (folder / "run_config.yaml").unlink()
    assert "got neither context/model.yaml (NeMo's), run_config.yaml (Bridge's) nor config.json" in _refusal(
        capsys, "--model", str(folder), "--gpus", "1"
    )


def test_a_model_folder_dense_upcycled_or_moe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(_config(tmp_path))
    dense = _json(capsys, "--model", folder, "--gpus", "64")
    assert dense["model"]["total_params"] == 8_030_261_248
    assert f"llama3_8b_dense_ct(dense='{folder}', num_nodes=8, num_gpus_per_node=8)" in dense["rows"][0]["command"]
    moe = _json(capsys, "--model", folder, "--experts", "8", "--top-k", "2", "--gpus", "64")
    assert moe["model"]["total_params"] == 47_491_321_856
    assert f"llama3_8b_e8t2(dense='{folder}', num_nodes=8," in moe["rows"][0]["command"]
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    _config(tmp_path, vocab_size=32000, **mixtral)
    assert _json(capsys, "--model", folder, "--gpus", "64")["model"]["total_params"] == 46_702_792_704
    assert _run("--model", folder, "--gpus", "64", "--rows", "1") == 0
    assert "No recipe of this package trains this model" in capsys.readouterr().out
    more = _json(capsys, "--model", folder, "--experts", "16", "--gpus", "64")["model"]
    layers, routers, networks = 32, 8 * 4096, 8 * 3 * 4096 * 14336
    assert more["total_params"] == 46_702_792_704 + layers * (routers + networks)
    assert "--granularity: got 2, expected none" in _refusal(
        capsys, "--model", folder, "--experts", "16", "--granularity", "2", "--gpus", "64"
    )
