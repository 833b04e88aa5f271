"""A checkpoint is read by its own description: NeMo's context, Bridge's configuration, or Megatron-LM's arguments."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.convert.megatron_weights import open_checkpoint
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.compatibility import Written, caveats
from nemo_upcycle.models.hf_config import architecture_from_config, read_architecture
from nemo_upcycle.models.layer_settings import MULTIPLIERS, decoder_settings, window_fields
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.sources.checkpoint_context import CheckpointContext, read_context
from nemo_upcycle.utils.files import MODEL_MARKER, read_json
from tests.distributed.ranks import run_ranks
from tests.folders import SPEC, change_config
from tests.models import LLAMA3_SCALING
from tests.unit.convert.exports import write_checkpoint
from tests.unit.sources.test_distributed_checkpoint import _Runs
from tests.unit.sources.test_megatron_checkpoint import dump_context


FINE = UpcycleSpec(
    num_experts=8, top_k=4, granularity=2, shared_experts=1, moe_layers="1", router_order="softmax_topk"
)
SIZES = {
    **{"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2},
    **{"rotary_base": 100000, "apply_rope_fusion": False},
}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.02}
SCALED = {"rope_scaling": LLAMA3_SCALING}
MISTRAL = {"architectures": ["MistralForCausalLM"]}


def _write_contexts(folder: str) -> None:
    from nemo.collections import llm

    fine = {"num_moe_experts": 8, "moe_router_topk": 4, "moe_router_pre_softmax": True, "moe_ffn_hidden_size": 48}
    fine |= {"moe_shared_expert_intermediate_size": 48, "moe_layer_freq": [0, 1]}
    configs = {
        "plain": llm.LlamaConfig(**SIZES, **MOE),
        "fine": llm.LlamaConfig(**SIZES, **fine, moe_router_load_balancing_type="none"),
        "window": llm.MistralConfig7B(**SIZES, **MOE, window_size=[16, 0]),  # NeMo imports a window of 16 like this
        "scaled": llm.Llama31Config8B(**SIZES, **MOE),
    }
    for name, config in configs.items():
        dump_context(llm.LlamaModel(config), Path(folder) / name / "context")


@pytest.fixture(scope="module")
def saved(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with contexts that NeMo wrote."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(_write_contexts, 1, str(folder), process_group=False)
    for name in ("plain", "fine", "window", "scaled"):
        write_checkpoint(folder / name, dense, FINE if name == "fine" else SPEC)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of four experts with top-2, for a test to change."""
    return Path(shutil.copytree(saved / "plain", tmp_path / "ck"))


def _set(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "context/model.yaml"
    model = yaml.safe_load(path.read_text())
    model["config"] |= changes
    path.write_text(yaml.safe_dump(model))


@pytest.mark.parametrize(
    ("name", "spec", "said"),
    [
        ("plain", SPEC, {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}),
        (
            *("fine", FINE),
            {"architectures": ["Qwen2MoeForCausalLM"], "norm_topk_prob": False, "mlp_only_layers": [0]}
            | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "router_aux_loss_coef": 0.0},
        ),
    ],
)
def test_an_export_takes_from_the_context_what_nobody_said(
    saved: Path, dense: Path, tmp_path: Path, name: str, spec: UpcycleSpec, said: dict[str, Any]
) -> None:
    for output, given in (("said", spec), ("unsaid", None)):
        export_checkpoint(saved / name, dense, tmp_path / output, spec=given)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "said" / file).read_bytes() == (tmp_path / "unsaid" / file).read_bytes()
    assert read_json(tmp_path / "unsaid/config.json").items() >= said.items()
    notes = [read_json(tmp_path / output / MODEL_MARKER)["notes"] for output in ("said", "unsaid")]
    assert notes[0] == notes[1] == list(caveats(Written(read_architecture(tmp_path / "said"), 2)))


@pytest.mark.parametrize(("name", "value"), [("top_k", 4), ("moe_layers", "every-2"), ("granularity", 2)])
def test_a_spec_that_the_context_contradicts_is_refused(saved: Path, dense: Path, name: str, value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        open_checkpoint(saved / "plain", dense, UpcycleSpec(**{"num_experts": 4, name: value}))
    assert (caught.value.field, caught.value.got) == (name, value)
    assert str(caught.value.expected).endswith("model.yaml")


@pytest.mark.parametrize(
    ("context", "changes", "refused"),
    [
        ("plain", SCALED, "rope_scaling"),
        ("scaled", {}, "rope_scaling"),
        ("scaled", SCALED, None),
        ("plain", {"hidden_act": "gelu_pytorch_tanh"}, "activation"),
        ("plain", MISTRAL | {"sliding_window": 64, "max_position_embeddings": 4096}, "sliding_window"),
        # NeMo imports a window that is one token too long.
        ("window", MISTRAL | {"sliding_window": 16}, None),
        ("window", MISTRAL | {"sliding_window": 17}, None),
        ("window", MISTRAL | {"sliding_window": 15}, "sliding_window"),
        ("window", MISTRAL | {"sliding_window": None}, "sliding_window"),
    ],
)
def test_a_parent_of_another_function_is_refused(
    saved: Path, dense: Path, tmp_path: Path, context: str, changes: dict[str, Any], refused: str | None
) -> None:
    parent = change_config(Path(shutil.copytree(dense, tmp_path / "parent")), **changes)
    if refused is None:
        open_checkpoint(saved / context, parent, None)
        return
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(saved / context, parent, None)
    assert caught.value.subject == f"{refused} of the parent {parent}"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("moe_router_num_groups", 2, "model.yaml: moe_router_num_groups is 2; expected "),
        ("position_embedding_type", "none", "model.yaml: position_embedding_type is none; expected "),
        ("moe_layer_freq", [1], "model.yaml does not describe a language model ("),
        ("window_size", 3, "model.yaml does not describe a language model ("),
    ],
)
def test_what_no_class_can_hold_is_refused(checkpoint: Path, dense: Path, name: str, value: Any, said: str) -> None:
    _set(checkpoint, **{name: value})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint, dense, SPEC)
    assert str(caught.value).startswith(f"{checkpoint}/context/{said}")


def test_an_export_says_what_it_takes_for_granted(checkpoint: Path, dense: Path, tmp_path: Path) -> None:
    _set(checkpoint, moe_expert_capacity_factor=4.0, _target_="mine.models.special.MyConfig")
    export_checkpoint(checkpoint, dense, tmp_path / "hf")
    dropped, unknown = read_json(tmp_path / "hf" / MODEL_MARKER)["notes"]
    assert dropped.startswith("moe_expert_capacity_factor=4 dropped tokens")
    assert "mine.models.special.MyConfig is unknown and read as a Megatron model" in unknown
    shutil.rmtree(checkpoint / "context")
    export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
    (assumed,) = read_json(tmp_path / "hf" / MODEL_MARKER)["notes"]
    assert "are assumed to be the parent's" in assumed
    assert assumed in (tmp_path / "hf/README.md").read_text()


ARGUMENTS = {
    **{"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "kv_channels": 16},
    **{"group_query_attention": True, "num_query_groups": 2, "norm_epsilon": 1e-5, "normalization": "RMSNorm"},
    **{"apply_layernorm_1p": False, "swiglu": True, "add_bias_linear": False, "add_qkv_bias": False},
    **{"untie_embeddings_and_output_weights": True, "position_embedding_type": "rope", "rotary_base": 100000},
    **{"rotary_percent": 1.0, "rotary_seq_len_interpolation_factor": None, "use_rope_scaling": False},
    **{"window_size": None, "seq_length": 128, "num_experts": 4, "moe_router_topk": 2, "moe_layer_freq": 1},
    **{"moe_router_pre_softmax": False, "moe_router_score_function": "softmax", "moe_ffn_hidden_size": None},
    **{"moe_router_topk_scaling_factor": None, "moe_aux_loss_coeff": [0.03], "params_dtype": torch.bfloat16},
}


def _megatron(folder: Path, dense: Path, **changes: Any) -> Path:
    """Write a checkpoint as Megatron-LM does, with its arguments beside the weights."""
    folder = write_checkpoint(folder, dense, SPEC, prefix="")
    arguments = argparse.Namespace(**(ARGUMENTS | {"iteration_hook": os.getcwd} | changes))
    common = {"args": arguments, "iteration": 7, "rng": [torch.zeros(3)], "checkpoint_version": 3.0}
    torch.save(common, folder / "weights/common.pt")
    return folder / "weights"


@pytest.mark.parametrize(
    ("changes", "spec", "subject", "got"),
    [
        ({}, UpcycleSpec(num_experts=4, top_k=3), "top_k", 3),
        ({"moe_router_pre_softmax": True}, SPEC, "router_order", "topk_softmax"),
        ({"rotary_base": 500000}, None, "rope_theta of the parent", 100000.0),
        ({"use_rope_scaling": True}, None, "rope_scaling of the parent", None),
        ({"norm_epsilon": 1e-6}, None, "norm_eps of the parent", 1e-5),
        ({"rotary_seq_len_interpolation_factor": 2}, None, "common.pt: seq_len_interpolation_factor", 2),
        ({"hybrid_layer_pattern": "*E|*-", "num_layers": 4}, SPEC, "moe_layers", "all"),
        ({"hybrid_layer_pattern": "*E*E*E", "num_layers": 6}, None, "num_layers of the parent", 2),
        (
            {"hybrid_layer_pattern": "M*E", "num_layers": 3},
            None,
            "hybrid_layer_pattern",
            "M*E has Mamba layers (M), and Megatron checkpoints with Mamba layers cannot be read",
        ),
    ],
)
def test_the_arguments_of_megatron_are_obeyed(
    dense: Path, tmp_path: Path, changes: dict[str, Any], spec: UpcycleSpec | None, subject: str, got: Any
) -> None:
    checkpoint = _megatron(tmp_path / "ck", dense, **changes)
    with pytest.raises(UpcycleError) as caught:
        open_checkpoint(checkpoint, dense, spec)
    assert subject in caught.value.subject
    assert caught.value.got == got


@pytest.mark.parametrize("changes", [{}, {"hybrid_layer_pattern": "*E|*E", "num_layers": 4}], ids=["gpt", "hybrid"])
def test_beside_megatrons_arguments_no_spec_is_needed(dense: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    export_checkpoint(_megatron(tmp_path / "ck", dense, **changes), dense, tmp_path / "hf")
    config = read_json(tmp_path / "hf/config.json")
    assert (config["num_experts_per_tok"], config["router_aux_loss_coef"]) == (2, 0.03)


def test_code_in_the_arguments_is_not_run(dense: Path, tmp_path: Path) -> None:
    checkpoint = _megatron(tmp_path / "ck", dense, hook=_Runs(tmp_path / "trace"))
    assert b"posix\nsystem" in (checkpoint / "common.pt").read_bytes()
    context = read_context(checkpoint)
    assert context is not None
    assert context.settings["moe_router_topk"] == 2
    assert not (tmp_path / "trace").exists()
    (checkpoint / "common.pt").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(
        CheckpointError, match=r"common\.pt does not describe a language model .*Copy the checkpoint again"
    ):
        read_context(checkpoint)


def _said(arch: Architecture) -> CheckpointContext:
    """Return a model's settings as in Bridge's `run_config.yaml`."""
    layers = {"_target_": "nemo_upcycle.online.decoder_layers.decoder_layers", "_partial_": True, "_args_": []}
    settings = megatron_fields(arch) | window_fields(arch)
    settings |= {
        "_target_": "megatron.GPTModel",
        "activation_func": {"_target_": "torch.nn.functional.silu" if arch.activation == "silu" else "openai_gelu"},
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "rotary_base": arch.rope_theta,
        "seq_length": arch.max_positions,
        "transformer_layer_spec": layers | decoder_settings(arch),
    }
    return CheckpointContext(Path("run_config.yaml"), settings)


#: Model -> class and further settings.
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMo 3": ("Olmo3ForCausalLM", {}),
    "EXAONE 4": ("Exaone4ForCausalLM", {}),
    "Gemma 3, long": ("Gemma3ForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "Granite": ("GraniteForCausalLM", {"attention_multiplier": 0.15} | dict.fromkeys(MULTIPLIERS, 6.0)),
}


def _special(name: str) -> Architecture:
    hf_class, changes = SPECIAL[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 250, "sliding_window": 16, "head_dim": 16}
    return architecture_from_config(sizes | {"architectures": [hf_class]} | changes)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_checkpoint_belongs_to_the_parent_with_its_layers(name: str) -> None:
    arch = _special(name)
    _said(arch).require_parent(arch, Path())
    assert name == "Granite" or _said(arch).model(arch.vocab_size).hf_class == arch.hf_class
    others: dict[str, Any] = {"post_norm": not arch.post_norm, "window_pattern": (True,) * 7 + (False,)}
    others |= {"local_rope_theta": 1234.0} if arch.local_rope_theta else {}
    others |= dict.fromkeys(("attention_multiplier", *MULTIPLIERS), 0.5)
    for field, value in others.items():
        with pytest.raises(CheckpointError, match="softmax_scale" if field == "attention_multiplier" else field):
            _said(arch).require_parent(replace(arch, **{field: value}), Path())


def test_refuses_an_exaone_with_positions_outside_its_windows() -> None:
    context = _said(_special("EXAONE 4"))
    context.settings["no_rope_freq"] = [1, 0] * 4
    with pytest.raises(CheckpointError, match="no_rope_freq"):
        context.require_parent(_special("EXAONE 4"), Path())
