"""`export` obeys what a checkpoint says of its own model: NeMo's `context/model.yaml`, Megatron-LM's arguments."""

from __future__ import annotations

import argparse
import json
import os
import pickletools
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.sources.checkpoint_context import read_context
from nemo_upcycle.utils.files import MODEL_MARKER, read_json
from tests.distributed.ranks import run_ranks
from tests.models import write_llama
from tests.unit.convert.exports import SPEC, _leaves_nothing, write_checkpoint


FINE = UpcycleSpec(
    num_experts=8, top_k=4, granularity=2, shared_experts=1, moe_layers="1", router_order="softmax_topk", seed=7
)
SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "rotary_base": 100000,
    "apply_rope_fusion": False,
}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.02}


def _write_contexts(folder: str) -> None:
    """Let NeMo write the contexts, as its trainer does."""
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.lightning.io.pl import TrainerContext

    fine = {
        "num_moe_experts": 8,
        "moe_router_topk": 4,
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": 48,
        "moe_shared_expert_intermediate_size": 48,
        "moe_layer_freq": [0, 1],
        "moe_router_load_balancing_type": "none",
    }
    configs = {
        "plain": llm.LlamaConfig(**SIZES, **MOE),
        "fine": llm.LlamaConfig(**SIZES, **fine),
        "window": llm.MistralConfig7B(**SIZES, **MOE, window_size=[16, 0]),  # as NeMo imports a window of 16
        "scaled": llm.Llama31Config8B(**SIZES, **MOE),
    }
    for name, config in configs.items():
        trainer = nl.Trainer(accelerator="cpu", devices=1)
        context = TrainerContext(model=llm.LlamaModel(config), trainer=trainer, extra={})
        context.io_dump(Path(folder) / name, yaml_attrs=["model"])


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts")
    run_ranks(_write_contexts, 1, str(folder), process_group=False)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense"), layers=2)


@pytest.fixture
def checkpoint(dense: Path, contexts: Path, tmp_path: Path) -> Path:
    """A checkpoint of four experts, top-2, with NeMo's own context, which the test may change."""
    folder = write_checkpoint(tmp_path / "ck", dense, SPEC)
    shutil.copytree(contexts / "plain", folder / "context")
    return folder


def _set(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "context/model.yaml"
    model = yaml.safe_load(path.read_text())
    model["config"] |= changes
    path.write_text(yaml.safe_dump(model))


def _parent(dense: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(dense, folder)
    config = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_export_takes_from_the_context_what_nobody_said(checkpoint: Path, dense: Path, tmp_path: Path) -> None:
    for name, spec in (("said", SPEC), ("unsaid", None)):
        export_checkpoint(checkpoint, dense, tmp_path / name, spec=spec)
    said, unsaid = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("said", "unsaid"))
    assert said == unsaid
    config = read_json(tmp_path / "unsaid/config.json")
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert config["router_aux_loss_coef"] == 0.02
    assert read_json(tmp_path / "unsaid" / MODEL_MARKER)["notes"] == []


def test_export_reads_every_structural_field_from_the_context(contexts: Path, dense: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, FINE)
    shutil.copytree(contexts / "fine", checkpoint / "context")
    export_checkpoint(checkpoint, dense, tmp_path / "said", spec=FINE)
    export_checkpoint(checkpoint, dense, tmp_path / "unsaid")
    config = read_json(tmp_path / "unsaid/config.json")
    assert config == read_json(tmp_path / "said/config.json")
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert (config["norm_topk_prob"], config["mlp_only_layers"]) == (False, [0])
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (48, 48)
    assert config["router_aux_loss_coef"] == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"top_k": 4},
            r"top_k: got 4, expected 2 \(moe_router_topk in .*model\.yaml\)\. Fix: omit top_k",
        ),
        (
            {"router_order": "softmax_topk"},
            r"router_order: got softmax_topk, expected topk_softmax \(moe_router",
        ),
        ({"router_score": "sigmoid"}, r"got sigmoid, expected softmax \(moe_router_score_function"),
        ({"routed_scaling_factor": 2.5}, r"got 2\.5, expected 1\.0 \(moe_router_topk_scaling_factor"),
        ({"moe_layers": "every-2"}, r"got every-2, expected all \(moe_layer_freq"),
        ({"granularity": 2}, r"got 2, expected 1 \(moe_ffn_hidden_size"),
    ],
)
def test_export_refuses_a_spec_that_the_context_contradicts(
    checkpoint: Path, dense: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with _leaves_nothing(tmp_path, SpecError, words):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=UpcycleSpec(**{"num_experts": 4, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_theta": 10000.0},
            r"rope_theta of .*got 10000\.0, expected 100000\.0 \(rotary_base in .*model\.y",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            r"rope_scaling of .*llama3.*expected None",
        ),
        ({"rms_norm_eps": 1e-6}, r"norm_eps of .*got 1e-06, expected 1e-05 \(layernorm_epsilon"),
        ({"hidden_act": "gelu_pytorch_tanh"}, r"activation of .*got gelu_tanh, expected silu \(activation_func"),
        ({"num_attention_heads": 2, "head_dim": 32}, r"num_heads of .*got 2, expected 4 \(num_attention_heads"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 64, "max_position_embeddings": 4096},
            r"sliding_window of .*got 64, expected None \(window_size",
        ),
    ],
)
def test_export_refuses_a_parent_of_another_function(
    checkpoint: Path, dense: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    parent = _parent(dense, tmp_path / "parent", **changes)
    with _leaves_nothing(tmp_path, CheckpointError, words):
        export_checkpoint(checkpoint, parent, tmp_path / "hf")


@pytest.mark.parametrize(("window", "fits"), [(16, True), (17, True), (15, False), (None, False)])
def test_export_takes_the_window_that_nemo_imports_one_too_long(
    contexts: Path, dense: Path, tmp_path: Path, window: int | None, fits: bool
) -> None:
    parent = _parent(dense, tmp_path / "parent", architectures=["MistralForCausalLM"], sliding_window=window)
    checkpoint = write_checkpoint(tmp_path / "ck", parent, SPEC)
    shutil.copytree(contexts / "window", checkpoint / "context")
    if fits:
        export_checkpoint(checkpoint, parent, tmp_path / "hf")
        assert read_json(tmp_path / "hf/config.json")["sliding_window"] == window
    else:
        with _leaves_nothing(tmp_path, CheckpointError, "sliding_window of .*expected 17"):
            export_checkpoint(checkpoint, parent, tmp_path / "hf")


def test_export_refuses_a_parent_without_the_scaling_that_the_context_has(
    contexts: Path, dense: Path, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    shutil.copytree(contexts / "scaled", checkpoint / "context")
    with _leaves_nothing(tmp_path, CheckpointError, r"rope_scaling of .*got None, expected .*llama3"):
        export_checkpoint(checkpoint, dense, tmp_path / "hf")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    parent = _parent(dense, tmp_path / "parent", rope_scaling=scaling)
    export_checkpoint(checkpoint, parent, tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_router_num_groups": 2}, "moe_router_num_groups: got 2, expected None"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "got sinkhorn, expected aux_loss or seq_aux_loss"),
        ({"seq_len_interpolation_factor": 4.0}, r"seq_len_interpolation_factor: got 4\.0, expected None"),
        ({"position_embedding_type": "none"}, "position_embedding_type: got none, expected rope"),
    ],
)
def test_export_refuses_what_no_class_can_hold(
    checkpoint: Path, dense: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    _set(checkpoint, **changes)
    with _leaves_nothing(tmp_path, CheckpointError, words + r".*keep the model in NeMo"):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)


def test_export_says_what_it_takes_for_granted(checkpoint: Path, dense: Path, tmp_path: Path) -> None:
    _set(checkpoint, moe_expert_capacity_factor=4.0, _target_="mine.models.special.MyConfig")
    export_checkpoint(checkpoint, dense, tmp_path / "hf")
    dropped, unknown = read_json(tmp_path / "hf" / MODEL_MARKER)["notes"]
    assert dropped == "moe_expert_capacity_factor=4 dropped tokens in training; here none is dropped"
    assert "mine.models.special.MyConfig is not known" in unknown
    shutil.rmtree(checkpoint / "context")
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
    (assumed,) = read_json(tmp_path / "hf" / MODEL_MARKER)["notes"]
    assert "rotary embedding, norm epsilon, activation and window are taken to be the parent's" in assumed
    assert assumed in (tmp_path / "hf/README.md").read_text()


def test_export_refuses_a_context_that_cannot_be_read(checkpoint: Path, dense: Path, tmp_path: Path) -> None:
    (checkpoint / "context/model.yaml").write_text("config: [")
    with _leaves_nothing(tmp_path, CheckpointError, r"model\.yaml: got an unreadable description"):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)


@pytest.mark.parametrize("changes", [{"moe_layer_freq": [1]}, {"moe_ffn_hidden_size": "wide"}, {"window_size": 3}])
def test_export_refuses_settings_of_other_types(
    checkpoint: Path, dense: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    _set(checkpoint, **changes)
    with _leaves_nothing(tmp_path, CheckpointError, r"model\.yaml: got settings of other types"):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)


ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 100000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "window_size": None,
    "seq_length": 128,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_aux_loss_coeff": [0.03],
    "params_dtype": torch.bfloat16,
    "iteration_hook": os.getcwd,
}


def _megatron(folder: Path, dense: Path, **changes: Any) -> Path:
    """Write a checkpoint as Megatron-LM keeps it: its arguments are beside the weights."""
    folder = write_checkpoint(folder, dense, SPEC, prefix="")
    arguments = argparse.Namespace(**(ARGUMENTS | changes))
    common = {"args": arguments, "iteration": 7, "rng": [torch.zeros(3)], "checkpoint_version": 3.0}
    torch.save(common, folder / "weights/common.pt")
    return folder / "weights"


@pytest.mark.parametrize(
    ("changes", "spec", "words"),
    [
        ({}, UpcycleSpec(num_experts=4, top_k=3), r"top_k: got 3, expected 2 \(moe_router_topk in .*common\.pt\)"),
        ({"moe_router_pre_softmax": True}, SPEC, "got topk_softmax, expected softmax_topk"),
        ({"rotary_base": 500000}, None, r"rope_theta of .*got 100000\.0, expected 500000\.0"),
        ({"use_rope_scaling": True}, None, r"rope_scaling of .*got None, expected .*'factor': 8\.0"),
        ({"norm_epsilon": 1e-6}, None, "norm_eps of .*expected 1e-06"),
        ({"rotary_seq_len_interpolation_factor": 2}, None, "seq_len_interpolation_factor: got 2"),
        ({"hybrid_layer_pattern": "*E|*-", "num_layers": 4}, SPEC, "moe_layers: got all, expected 0"),
        ({"hybrid_layer_pattern": "*E*E*E", "num_layers": 6}, None, "num_layers of .*got 2, expected 3"),
        ({"hybrid_layer_pattern": "M*E", "num_layers": 3}, None, r"hybrid_layer_pattern: got M\*E"),
    ],
)
def test_export_obeys_the_arguments_of_megatron(
    dense: Path, tmp_path: Path, changes: dict[str, Any], spec: UpcycleSpec | None, words: str
) -> None:
    checkpoint = _megatron(tmp_path / "ck", dense, **changes)
    with _leaves_nothing(tmp_path, (SpecError, CheckpointError), words):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=spec)


@pytest.mark.parametrize("changes", [{}, {"hybrid_layer_pattern": "*E|*E", "num_layers": 4}], ids=["gpt", "hybrid"])
def test_export_needs_no_spec_beside_the_arguments_of_megatron(
    dense: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    export_checkpoint(_megatron(tmp_path / "ck", dense, **changes), dense, tmp_path / "hf")
    config = read_json(tmp_path / "hf/config.json")
    assert (config["num_experts_per_tok"], config["router_aux_loss_coef"]) == (2, 0.03)


class _Runs:
    """Pickles to a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def _operations(path: Path) -> list[tuple[str, Any]]:
    """Return what unpickling a file of torch.save would do, without doing it."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]


def test_code_in_the_arguments_is_not_run(dense: Path, tmp_path: Path) -> None:
    checkpoint = _megatron(tmp_path / "ck", dense, hook=_Runs(tmp_path / "trace"))
    assert ("GLOBAL", "posix mkdir") in _operations(checkpoint / "common.pt"), "the call is in the file"
    context = read_context(checkpoint)
    assert context is not None
    assert context.settings["moe_router_topk"] == 2
    assert not (tmp_path / "trace").exists()
    (checkpoint / "common.pt").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(CheckpointError, match=r"common\.pt: got an unreadable .*copy the checkpoint again"):
        read_context(checkpoint)
