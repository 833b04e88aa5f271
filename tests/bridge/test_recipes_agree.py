"""Recipes by Bridge's naming have the numbers of NeMo's, and fit the GPUs that they name by the planner."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nemo_upcycle.planning.commands import BRIDGE_RECIPES
from nemo_upcycle.planning.hardware import known_gpu, known_recipe
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.values import setting
from tests.golden import GOLDEN, TABLE, golden_path
from tests.models import LLAMA3_8B


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
DENSE, SPEC = "NEMO_UPCYCLE_DENSE", "resume.restore_config.spec."
PRECISIONS = {"bf16": "bf16", "fp8cs": "fp8-current", "fp8sc": "fp8-blockwise", "fp8mx": "mxfp8"}
_LLAMA31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_LLAMA32 = LLAMA3_8B | {
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "rope_scaling": _LLAMA31_SCALING | {"factor": 32.0},
    "tie_word_embeddings": True,
}
#: The parents' `config.json`, as far as it decides anything.
PARENTS: dict[str, dict[str, Any]] = {
    "llama3_8b": LLAMA3_8B,
    "llama31_8b": LLAMA3_8B | {"max_position_embeddings": 131072, "rope_scaling": _LLAMA31_SCALING},
    "llama3_70b": LLAMA3_8B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen3_8b": _QWEN3_8B,
    "qwen3_600m": _QWEN3_8B
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"tie_word_embeddings": True},
    "llama32_1b": _LLAMA32 | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "llama32_3b": _LLAMA32 | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
    "qwen3_1p7b": _QWEN3_8B
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"tie_word_embeddings": True},
    "qwen3_4b": _QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "qwen3_14b": _QWEN3_8B
    | {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "qwen3_32b": _QWEN3_8B
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
    "olmo2_7b": LLAMA3_8B
    | {"architectures": ["Olmo2ForCausalLM"], "intermediate_size": 11008, "num_key_value_heads": 32}
    | {"vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6},
    "smollm2_135m": LLAMA3_8B
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0, "tie_word_embeddings": True},
}
#: Of one table: those that are not on 64 GPUs.
ON_512 = ("qwen3_14b", "qwen3_32b", "olmo2_7b")
#: NeMo has no such dispatcher; the training is that of its recipe.
HYBRIDEP = "qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_hybridep_config"
#: Recipe by Bridge's naming -> NeMo's, as `tests/golden` has it.
PAIRS = {
    "llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config": "llama3_8b_e8t2",
    "llama3_8b_e8t2_pretrain_128gpu_h100_fp8cs_config": "llama3_8b_e8t2-fast",
    "llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config": "llama3_8b_dense_ct",
    "llama31_8b_e8t2_pretrain_512gpu_h100_bf16_config": "llama31_8b_e8t2",
    "llama31_8b_e8t2_pretrain_128gpu_h100_fp8cs_config": "llama31_8b_e8t2-fp8",
    "llama31_8b_dense_ct_pretrain_512gpu_h100_bf16_config": "llama31_8b_dense_ct",
    "llama3_70b_e8t2_pretrain_512gpu_h100_bf16_config": "llama3_70b_e8t2",
    "llama3_70b_e8t2_pretrain_512gpu_h100_fp8sc_config": "llama3_70b_e8t2-fp8",
    "llama3_70b_dense_ct_pretrain_512gpu_h100_bf16_config": "llama3_70b_dense_ct",
    "qwen3_8b_e8t2_pretrain_512gpu_h100_bf16_config": "qwen3_8b_e8t2",
    HYBRIDEP: "qwen3_8b_e8t2",
    "qwen3_8b_e8t2_pretrain_128gpu_h100_fp8sc_config": "qwen3_8b_e8t2-fp8",
    "qwen3_8b_dense_ct_pretrain_512gpu_h100_bf16_config": "qwen3_8b_dense_ct",
    **{
        f"{base}_{kind}_pretrain_{512 if base in ON_512 else 64}gpu_h100_bf16_config": f"{base}_{kind}"
        for base in TABLE
        for kind in ("e8t2", "dense_ct")
    },
    "qwen3_600m_e8t2_pretrain_1gpu_h100_bf16_config": "qwen3_600m_e8t2",
    "qwen3_600m_dense_ct_pretrain_1gpu_h100_bf16_config": "qwen3_600m_dense_ct",
    "smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config": "smollm2_135m_e8t2",
    "smollm2_135m_dense_ct_pretrain_1gpu_h100_bf16_config": "smollm2_135m_dense_ct",
    **{
        f"{model}_{kind}_sft_{gpus}gpu_h100_bf16_config": f"{model}_{kind}_sft"
        for model, gpus in (("llama3_8b", 64), ("qwen3_8b", 64), ("qwen3_600m", 1), ("smollm2_135m", 1))
        for kind in ("e8t2", "dense")
    },
}
#: On a GPU that NeMo's recipes are not for: their trainings, in layouts of the planner's.
B200 = {
    "llama3_8b_e8t2_pretrain_64gpu_b200_bf16_config": "llama3_8b_e8t2",
    "llama3_8b_dense_ct_pretrain_64gpu_b200_bf16_config": "llama3_8b_dense_ct",
    "llama31_8b_e8t2_pretrain_64gpu_b200_bf16_config": "llama31_8b_e8t2",
    "llama31_8b_dense_ct_pretrain_64gpu_b200_bf16_config": "llama31_8b_dense_ct",
    "llama3_70b_e8t2_pretrain_256gpu_b200_bf16_config": "llama3_70b_e8t2",
    "llama3_70b_dense_ct_pretrain_256gpu_b200_bf16_config": "llama3_70b_dense_ct",
    "qwen3_8b_e8t2_pretrain_64gpu_b200_bf16_config": "qwen3_8b_e8t2",
    "qwen3_8b_dense_ct_pretrain_64gpu_b200_bf16_config": "qwen3_8b_dense_ct",
}
#: The same on racks of GB200: with HybridEP, which drops nothing without a capacity, fast runs in MXFP8.
GB200 = {
    **{name.replace("_b200_", "_gb200_"): nemos for name, nemos in B200.items()},
    "llama3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config": "llama3_8b_e8t2-fast",
    "llama31_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config": "llama31_8b_e8t2-fp8",
    "llama3_70b_e8t2_pretrain_256gpu_gb200_fp8mx_config": "llama3_70b_e8t2-fp8",
    "qwen3_8b_e8t2_pretrain_64gpu_gb200_fp8mx_config": "qwen3_8b_e8t2-fp8",
}
ALL = PAIRS | B200 | GB200
FAST = [name for name in GB200 if "_fp8mx_" in name]
WITH_HYBRIDEP = [HYBRIDEP, *(name for name in GB200 if "_e8t2_" in name)]
#: What Bridge's own recipe for GB200 sets, and ours too.
OF_BRIDGES = (
    "model.moe_token_dispatcher_type",
    "model.moe_flex_dispatcher_backend",
    "model.moe_hybridep_num_sms",
    "model.moe_hybridep_num_sms_preprocessing",
    "model.high_priority_a2a_comm_stream",
    "model.use_transformer_engine_op_fuser",
    "model.moe_mlp_glu_interleave_size",
    "model.moe_pad_expert_input_to_capacity",
    "model.moe_expert_capacity_factor",
    "model.recompute_granularity",
    "model.cuda_graph_impl",
    "model.cuda_graph_scope",
    "model.use_te_rng_tracker",
    "rng.te_rng_tracker",
    "comm_overlap.overlap_moe_expert_parallel_comm",
    "comm_overlap.delay_wgrad_compute",
    "ddp.grad_reduce_in_fp32",
    "mixed_precision.fp8",
    "mixed_precision.fp8_recipe",
    "mixed_precision.fp8_dot_product_attention",
    "mixed_precision.grad_reduce_in_fp32",
)
#: 73.1 of 79.1 GiB, in NeMo's layout.
TIGHT = {"qwen3_8b_dense_ct_pretrain_512gpu_h100_bf16_config", "qwen3_8b_dense_sft_64gpu_h100_bf16_config"}
#: By LoRA, whose adapters Bridge saves alone: they have no checkpoint to start from where a model is upcycled online.
IN_NEMO_ALONE = {"llama32_1b_e8t2_sft", "llama32_1b_dense_sft", "qwen3_1p7b_e8t2_sft", "qwen3_1p7b_dense_sft"}
#: Bridge's setting -> NeMo's.
LAYOUT = {
    f"model.{name}": f"trainer.strategy.{name}"
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
    )
}
EXPERTS = {
    "model.expert_tensor_parallel_size": "trainer.strategy.expert_tensor_parallel_size",
    "model.expert_model_parallel_size": "trainer.strategy.expert_model_parallel_size",
    "model.moe_expert_capacity_factor": "model.config.moe_expert_capacity_factor",
    "model.moe_pad_expert_input_to_capacity": "model.config.moe_pad_expert_input_to_capacity",
    "model.recompute_modules": "model.config.recompute_modules",
    "model.moe_aux_loss_coeff": "model.config.moe_aux_loss_coeff",
    "model.moe_router_pre_softmax": "model.config.moe_router_pre_softmax",
}
TRAINING = {
    "dataset.seq_length": "data.seq_length",
    "model.seq_length": "data.seq_length",
    "train.global_batch_size": "data.global_batch_size",
    "train.micro_batch_size": "data.micro_batch_size",
    "train.train_iters": "trainer.max_steps",
    "validation.eval_interval": "trainer.val_check_interval",
    "validation.eval_iters": "trainer.limit_val_batches",
    "optimizer.lr": "optim.config.lr",
    "optimizer.min_lr": "optim.lr_scheduler.min_lr",
    "scheduler.lr_warmup_iters": "optim.lr_scheduler.warmup_steps",
    "optimizer.weight_decay": "optim.config.weight_decay",
    "scheduler.start_weight_decay": "optim.config.weight_decay",
    "scheduler.end_weight_decay": "optim.config.weight_decay",
    "optimizer.adam_beta1": "optim.config.adam_beta1",
    "optimizer.adam_beta2": "optim.config.adam_beta2",
    "optimizer.adam_eps": "optim.config.adam_eps",
    "optimizer.clip_grad": "optim.config.clip_grad",
    "ddp.grad_reduce_in_fp32": "trainer.strategy.ddp.grad_reduce_in_fp32",
    "checkpoint.save_interval": "log.ckpt.every_n_train_steps",
    "checkpoint.most_recent_k": "log.ckpt.keep_last",
}


@pytest.fixture
def parent(name: str, tmp_path: Path) -> Path:
    """The folder of a recipe's parent with its configuration: nothing is read of the weights before the start."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | PARENTS[_model(name)]))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_has_the_numbers_of_nemos(name: str, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_upcycle.trainers.bridge.chat import ChatDataset
    from nemo_upcycle.trainers.bridge.upcycling import hook_of

    addresses: list[str] = []

    def fetch(address: str) -> Path:
        addresses.append(address)
        return parent

    monkeypatch.setattr("nemo_upcycle.trainers.bridge.recipes.common.ensure_dense", fetch)
    nemo = _golden(ALL[name])
    config = _recipe(name)()
    same = TRAINING | EXPERTS | (LAYOUT if name in PAIRS else {})
    expected = {ours: nemo.get(theirs) or None for ours, theirs in same.items()}
    if "_sft_" in name:  # all packs that are held back: no more than there are, in Bridge
        assert expected.pop("validation.eval_iters") == 1.0
        assert config.validation.eval_iters == 32
    if name in WITH_HYBRIDEP:  # 8 experts, top-2: a factor of 4 drops nothing
        assert expected.pop("model.moe_expert_capacity_factor") == (1.0 if name in FAST else 4.0)
        assert config.model.moe_expert_capacity_factor is None
    if name in FAST:
        assert expected.pop("model.moe_pad_expert_input_to_capacity") is True
        assert not config.model.moe_pad_expert_input_to_capacity
    assert {ours: setting(config, ours) or None for ours in expected} == expected
    assert ("_sft_" in name) == isinstance(config.dataset, ChatDataset) == (nemo["tokenizer"] == "data")
    hook = hook_of(config)
    assert hook is not None
    spec = {key.removeprefix(SPEC): value for key, value in nemo.items() if key.startswith(SPEC)}
    spec.pop("is", None)
    assert hook.spec == (UpcycleSpec(**spec) if spec else None)
    assert addresses == [nemo["resume.restore_config.path"]]
    if name in PAIRS and "_bf16_" in name:
        assert _gpus(name) == nemo["trainer.num_nodes"] * nemo["trainer.devices"]


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_fits_its_gpus_by_the_planner(name: str, parent: Path) -> None:
    from nemo_upcycle.pipeline.bridge.pipeline import training_of
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of

    training = training_of(name, [], None)
    training.check_parent("dense_ct" if "_dense_" in name else "pretrain", str(parent), remote=False)
    facts = training.facts(str(parent))
    assert facts is not None
    assert facts.layout.gpus == _gpus(name)
    known = known_recipe(re.split(r"_pretrain_|_\d+gpu_", name)[0])
    assert training.reads_chat == known.tunes
    assert (facts.arch.total_params, facts.arch.active_params) == (known.arch.total_params, known.arch.active_params)
    assert facts.profile.precision == next(kind for text, kind in PRECISIONS.items() if f"_{text}_" in name)
    assert (facts.profile.dispatcher == "hybridep") == (name in WITH_HYBRIDEP)
    assert training.ranks_per_node == min(_gpus(name), known_gpu(_gpu(name)).per_node)
    first, later = plans_of(facts, known_gpu(_gpu(name)))
    expected = "tight" if name in TIGHT else "fits"
    assert (first.verdict, later.verdict) == (expected, expected)


def test_every_recipe_of_nemos_has_its_pair_and_every_pair_is_listed() -> None:
    from nemo_upcycle.trainers.bridge.recipes import named_recipes

    paired = {GOLDEN[golden][0] for golden in PAIRS.values()}
    assert {recipe for recipe, _ in GOLDEN.values()} == paired | IN_NEMO_ALONE
    assert set(named_recipes()) == set(ALL)


@pytest.mark.parametrize("name", WITH_HYBRIDEP)
def test_hybridep_is_told_the_nvlink_domain(name: str, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DENSE, str(parent))
    config = _recipe(name)()
    assert (config.model.moe_token_dispatcher_type, config.model.moe_router_dtype) == ("flex", "fp32")
    assert config.env_vars["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] == config.model.expert_model_parallel_size
    domain = known_gpu(_gpu(name)).nvlink_gpus
    assert (config.env_vars["NVLINK_DOMAIN_SIZE"], config.env_vars["USE_MNNVL"]) == (domain, domain > 8)


@pytest.mark.parametrize("name", FAST)
def test_a_fast_run_on_gb200_has_what_bridges_own_has(
    name: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.qwen.gb200 import qwen3_moe
    from transformers import Qwen3MoeConfig

    model = AutoBridge.from_hf_config(Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"]))
    monkeypatch.setattr(AutoBridge, "from_hf_pretrained", lambda *_, **__: model)  # which would ask the hub
    monkeypatch.setenv(DENSE, str(parent))
    ours, theirs = _recipe(name)(), qwen3_moe.qwen3_30b_a3b_pretrain_8gpu_gb200_fp8mx_functional_config()
    assert {one: setting(ours, one) for one in OF_BRIDGES} == {one: setting(theirs, one) for one in OF_BRIDGES}
    assert ours.env_vars == theirs.env_vars
    assert theirs.mixed_precision.fp8_param_gather
    assert not ours.mixed_precision.fp8_param_gather, "such parameters have been filled on no GPU"
    assert not ours.mixed_precision.reuse_grad_buf_for_mxfp8_param_ag, "it needs them"


@pytest.mark.parametrize("name", ALL)
def test_bridge_and_megatron_accept_what_is_set_on_such_gpus(
    name: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that they check before the start, on the first of as many ranks; the GPU is not there, and is described."""
    from megatron.bridge.training.config import runtime_config_update

    monkeypatch.setenv(DENSE, str(parent))
    for variable, value in (("WORLD_SIZE", _gpus(name)), ("RANK", 0)):
        monkeypatch.setenv(variable, str(value))
    gpu = SimpleNamespace(name=f"NVIDIA {_gpu(name).upper()}", major=9 if name in PAIRS else 10, minor=0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: gpu)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (gpu.major, gpu.minor))
    config = _recipe(name)()
    config.env_vars = {}  # they would go into this process
    runtime_config_update(config)
    assert config.data_parallel_size * config.model.tensor_model_parallel_size <= _gpus(name)
    assert config.model.delay_wgrad_compute == (name in FAST)
    assert bool(config.model.fp8) == ("_fp8" in name)


def test_every_upcycled_model_has_a_chain_with_its_baseline() -> None:
    from nemo_run.cli.api import list_factories

    from nemo_upcycle.pipeline.bridge.pipeline import pipeline

    chains = [factory() for factory in list_factories(f"{pipeline.__module__}.{pipeline.__name__}")]
    assert {one.recipe for one in chains} == set(BRIDGE_RECIPES.values())
    for one in chains:
        assert {one.recipe, one.dense_ct} <= set(PAIRS)
        dense = "_dense" if "_sft_" in one.recipe else "_dense_ct"
        assert PAIRS[one.dense_ct] == PAIRS[one.recipe].replace("_e8t2", dense)
        assert one.dense == _golden(PAIRS[one.recipe])["resume.restore_config.path"]


def _model(name: str) -> str:
    return re.split("_e8t2_|_dense_", name)[0]


def _recipe(name: str) -> Callable[[], Any]:
    from nemo_upcycle.trainers.bridge.recipes import named_recipes

    return named_recipes()[name]


def _gpu(name: str) -> str:
    return re.split(r"\dgpu_", name)[1].split("_")[0]


def _gpus(name: str) -> int:
    found = re.search(r"_(\d+)gpu_", name)
    assert found
    return int(found[1])


def _golden(name: str) -> dict[str, Any]:
    """Return NeMo's settings; YAML takes a number without a point, as `3e-05`, for text."""
    values = yaml.safe_load(golden_path(name).read_text(encoding="utf-8"))
    default = {"trainer.strategy.expert_model_parallel_size": 1}  # which dense recipes do not set
    default |= {"data.micro_batch_size": 1, "tokenizer": None}  # nor those that tune, or train on texts
    return default | {key: float(value) if _is_exponent(value) else value for key, value in values.items()}


def _is_exponent(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\de-\d+", value) is not None
