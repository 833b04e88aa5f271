"""`nemo-upcycle plan --model`: models of other kinds, and checkpoints of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.published import public_config
from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.planning.parameters import stage_plan
from tests.models import write_llama
from tests.unit.cli.test_plan import _config, _json, _refusal, _run
from tests.unit.convert.exports import write_checkpoint
from tests.unit.sources.test_checkpoint_context import _megatron
from tests.waiting import HANG_S


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


def _public(folder: Path, name: str) -> str:
    (folder / "config.json").write_text(json.dumps(public_config(name)))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("gpt_oss_120b", 64), ("gpt_oss_20b", 64), ("deepseek_v3", 1024), ("grok_1", 512), ("nemotron_3_nano", 64)],
)
def test_a_plan_says_that_nothing_else_takes_the_model(
    name: str, gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage_plan.cache_clear()
    found = _json(capsys, "--model", _public(tmp_path, name), "--gpus", str(gpus), "--global-batch", "1024")
    assert stage_plan.cache_info().misses < 300  # each takes milliseconds
    assert "is planned only: this package neither upcycles, converts nor trains it" in found["warnings"][0]
    assert {row["fits"] for row in found["rows"]} <= {"fits", "tight"}
    assert not any(row["command"] for row in found["rows"])


def test_the_parameters_of_multi_token_prediction_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("--model", _public(tmp_path, "deepseek_v3"), "--gpus", "1024", "--layout", "pp=8,ep=64,loss=3")
    text = " ".join(capsys.readouterr().out.split())
    assert "671.03B parameters, 37.55B active" in text
    assert "Multi-token prediction, which these leave out, has 11.61B parameters." in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", "8"], "--experts: got NemotronHForCausalLM, which nemo-upcycle plan alone knows"),
        (["--recompute", "mla_up_proj"], "expected another kind: only latent attention has mla_up_proj"),
        (["--layout", "tp=4"], "--layout tp: got 4, expected a divisor of the key-value heads (2)"),
    ],
)
def test_what_needs_a_model_of_ours_is_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", _public(tmp_path, "nemotron_3_nano"), "--gpus", "64"]
    assert words in _refusal(capsys, *model, *options)


def test_it_plans_them_without_torch(tmp_path: Path) -> None:
    folder = _public(tmp_path, "nemotron_3_nano")
    code = (
        "import sys\n"
        "from nemo_upcycle.cli.main import main\n"
        f"assert main(['plan', '--model', {folder!r}, '--gpus', '64', '--json']) == 0\n"
        "assert not {'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        # Two layers of latent attention and of networks, three matrices each: one of a shared expert, one of eight.
        (
            {"multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 32, "qk_head_dim": 16}
            | {"qk_pos_emb_head_dim": 8, "v_head_dim": 16, "mtp_num_layers": None},
            2 * (4 * 24 * 64 + 40 * 64 + 32 * 4 * 32 + 32 + 64 * 64 + 9 * 3 * 48 * 64 + 8 * 64 + 2 * 64),
        ),
        # A Mamba layer, an attention and a layer of experts without gates.
        (
            {"hybrid_layer_pattern": "M*|E", "num_layers": 3, "gated_linear_unit": False, "mamba_num_heads": 4}
            | {"mamba_head_dim": 8, "mamba_num_groups": 2, "mamba_state_dim": 4},
            (2 * 32 + 2 * 8 + 4) * 64 + 48 * 5 + 32 + 3 * 4 + 32 * 64
            + 2 * (64 + 32) * 64 + 9 * 2 * 48 * 64 + 8 * 64 + 3 * 64,
        ),
        # Windows in every second layer, and a sink a head.
        (
            {"softmax_type": "learnable", "window_size": [15, 0], "window_attn_skip_freq": 2, "add_bias_linear": True},
            2 * (2 * (64 + 32) * 64 + 128 + 64 + 4 + 8 * (3 * 48 * 64 + 96 + 64) + 8 * 65 + 2 * 64),
        ),
    ],
    ids=["latent attention", "mamba", "windows"],
)  # fmt: skip
def test_a_checkpoint_of_a_model_that_is_planned_only_is_planned(
    changes: dict[str, Any], total: int, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _bridge(tmp_path / "bridge", dense, **changes)
    found = _json(capsys, "--model", str(folder), "--gpus", "1", "--seq-length", "128", "--global-batch", "8")
    assert found["model"]["total_params"] == total + 64 + 2 * 250 * 64
    assert "is planned only" in found["warnings"][0]


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
