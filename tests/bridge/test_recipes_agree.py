"""Our Bridge recipes have the numbers of our NeMo recipes, and fit on their GPUs according to the planner."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.recipes import bridge_functions, known_recipe, known_recipes
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.settings import setting
from tests.golden import LAYOUT, PAIRS, TRAINING
from tests.models import LLAMA3_8B, write_tokenizer


PRECISIONS = {"bf16": "bf16", "fp8cs": "fp8-current", "fp8sc": "fp8-blockwise", "fp8mx": "mxfp8"}
_NAME = re.compile(
    r"(?P<recipe>.*?)(_pretrain)?_(?P<gpus>\d+)gpu_(?P<gpu>[a-z0-9]+)_(?P<precision>[a-z0-9]+)(_hybridep)?_config"
)


ALL = list(bridge_functions())
#: Recipes of models that NeMo can build.
PAIRED = [name for name in ALL if not name.startswith("qwen35")]
FAST = [name for name in ALL if "_fp8mx_" in name]
#: Recipes with a dispatcher that NeMo lacks. They set no capacity factor, so no token is dropped.
WITH_HYBRIDEP = [name for name in ALL if "_hybridep_" in name or ("_gb200_" in name and "_e8t2_" in name)]
_OF_MODEL = (
    *("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "moe_hybridep_num_sms"),
    *("moe_hybridep_num_sms_preprocessing", "high_priority_a2a_comm_stream"),
    *("use_transformer_engine_op_fuser", "moe_mlp_glu_interleave_size", "moe_pad_expert_input_to_capacity"),
    *("moe_expert_capacity_factor", "recompute_granularity", "cuda_graph_impl", "cuda_graph_scope"),
    "use_te_rng_tracker",
)
#: Settings that must be equal in Bridge's own recipe for GB200 and in ours.
OF_BRIDGES = (
    *(f"model.{name}" for name in _OF_MODEL),
    *("rng.te_rng_tracker", "comm_overlap.overlap_moe_expert_parallel_comm", "comm_overlap.delay_wgrad_compute"),
    *("ddp.grad_reduce_in_fp32", "mixed_precision.fp8", "mixed_precision.fp8_recipe"),
    *("mixed_precision.fp8_dot_product_attention", "mixed_precision.grad_reduce_in_fp32"),
)
#: Recipes that need 73.1 of 79.1 GiB, in NeMo's layout.
TIGHT = {"qwen3_8b_dense_ct_pretrain_512gpu_h100_bf16_config", "qwen3_8b_dense_sft_64gpu_h100_bf16_config"}


@pytest.fixture
def parent(name: str, tmp_path: Path) -> Path:
    """A folder with the configuration of a recipe's parent; before the start, no weights are read."""
    shape = known_recipe(_part(name, "recipe")).dense
    config: dict[str, Any] = LLAMA3_8B | {
        "model_type": "qwen3_5_text" if shape.delta else "llama",
        "architectures": [shape.hf_class],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions or 4096,
        "rope_theta": shape.rope_theta,
        "rope_scaling": shape.rope_scaling,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    if shape.delta:
        config |= {"linear_num_value_heads": shape.delta.num_value_heads, "rms_norm_eps": shape.norm_eps}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return write_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    """NeMo's settings by recipe; the fast run of a recipe has the suffix `-fast`."""
    lines = PAIRS.read_text(encoding="utf-8").splitlines()[1:]
    return {name: json.loads(values) for name, _, values in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("name", PAIRED)
def test_a_recipe_has_the_numbers_of_nemos(name: str, numbers: dict[str, Any]) -> None:
    from nemo_upcycle.trainers.bridge.chat import ChatDataset

    nemo, on_h100 = numbers[_pair(name)], _part(name, "gpu") == "h100"
    config = bridge_functions()[name]()
    same = TRAINING | (LAYOUT if on_h100 else {})  # on other GPUs, the planner chose the layout
    expected = {ours: nemo.get(theirs) or None for ours, theirs in same.items()}
    if "_sft_" in name:  # NeMo uses all held-out packs; Bridge uses at most 32 batches, fewer if there are fewer packs
        assert expected.pop("validation.eval_iters") == 1.0
        assert config.validation.eval_iters == 32
    if name in WITH_HYBRIDEP:  # 8 experts, top-2: a capacity factor of 4 drops nothing
        assert expected.pop("model.moe_expert_capacity_factor") == (1.0 if name in FAST else 4.0)
        assert config.model.moe_expert_capacity_factor is None
    if name in FAST:
        assert expected.pop("model.moe_pad_expert_input_to_capacity") is True
        assert not config.model.moe_pad_expert_input_to_capacity
    assert {ours: setting(config, ours) or None for ours in expected} == expected
    assert ("_sft_" in name) == isinstance(config.dataset, ChatDataset) == (nemo.get("tokenizer") == "data")
    assert config.spec == (None if nemo["spec"] is None else UpcycleSpec(**nemo["spec"]))
    assert config.parents == (nemo["resume.restore_config.path"],)
    if on_h100 and "_bf16_" in name:
        assert int(_part(name, "gpus")) == nemo["trainer.num_nodes"] * nemo["trainer.devices"]


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_fits_its_gpus_by_the_planner(name: str, parent: Path) -> None:
    from nemo_upcycle.pipeline.bridge.pipeline import training_of
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import plans_of

    training = training_of(name, [], None)
    training.check_parent("dense_ct" if "_dense_" in name else "pretrain", Parent(str(parent)), remote=False)
    facts = training.facts(Parent(str(parent)))
    assert facts is not None
    assert facts.layout.gpus == int(_part(name, "gpus"))
    known = known_recipe(_part(name, "recipe"))
    assert training.reads_chat == known.tunes
    assert (facts.arch.total_params, facts.arch.active_params) == (known.arch.total_params, known.arch.active_params)
    assert facts.profile.precision == next(kind for text, kind in PRECISIONS.items() if f"_{text}_" in name)
    assert (facts.profile.dispatcher == "hybridep") == (name in WITH_HYBRIDEP)
    assert training.ranks_per_node == min(int(_part(name, "gpus")), known_gpu(_part(name, "gpu")).per_node)
    first, later = plans_of(facts, known_gpu(_part(name, "gpu")))
    expected = "tight" if name in TIGHT else "fits"
    assert (first.verdict, later.verdict) == (expected, expected)


def test_every_recipe_of_nemo_has_a_pair_except_lora(numbers: dict[str, Any]) -> None:
    in_nemo = {name for name, known in known_recipes().items() if "nemo" in known.trainers and not known.lora}
    assert {_part(name, "recipe") for name in PAIRED} == in_nemo
    assert {_pair(name) for name in PAIRED} <= set(numbers)


@pytest.mark.parametrize("name", FAST)
def test_a_fast_run_on_gb200_has_what_bridges_own_has(
    name: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.qwen.gb200 import qwen3_moe
    from transformers import Qwen3MoeConfig

    model = AutoBridge.from_hf_config(Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"]))
    monkeypatch.setattr(AutoBridge, "from_hf_pretrained", lambda *_, **__: model)  # the original function asks the hub
    ours, theirs = (
        bridge_functions()[name](str(parent)),
        qwen3_moe.qwen3_30b_a3b_pretrain_8gpu_gb200_fp8mx_functional_config(),
    )
    assert {one: setting(ours, one) for one in OF_BRIDGES} == {one: setting(theirs, one) for one in OF_BRIDGES}
    assert ours.env_vars == theirs.env_vars
    assert theirs.mixed_precision.fp8_param_gather
    assert not ours.mixed_precision.fp8_param_gather, "such parameters have been filled on no GPU"
    assert not ours.mixed_precision.reuse_grad_buf_for_mxfp8_param_ag, "it needs them"


@pytest.mark.parametrize("name", ALL)
def test_bridge_and_megatron_accept_what_is_set_on_such_gpus(
    name: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run all checks that Bridge and Megatron make before a start, as rank 0, with a simulated GPU."""
    from megatron.bridge.training.config import runtime_config_update

    for variable, value in (("WORLD_SIZE", int(_part(name, "gpus"))), ("RANK", 0)):
        monkeypatch.setenv(variable, str(value))
    card = _part(name, "gpu")
    gpu = SimpleNamespace(name=f"NVIDIA {card.upper()}", major=9 if card == "h100" else 10, minor=0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: gpu)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (gpu.major, gpu.minor))
    config = bridge_functions()[name](str(parent))
    if name in WITH_HYBRIDEP:
        domain, experts = known_gpu(card).nvlink_gpus, config.model.expert_model_parallel_size
        assert (config.model.moe_token_dispatcher_type, config.model.moe_router_dtype) == ("flex", "fp32")
        assert config.env_vars["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] == experts
        assert (config.env_vars["NVLINK_DOMAIN_SIZE"], config.env_vars["USE_MNNVL"]) == (domain, domain > 8)
    config.env_vars = {}  # keeps the recipe's variables out of this process
    runtime_config_update(config)
    assert config.data_parallel_size * config.model.tensor_model_parallel_size <= int(_part(name, "gpus"))
    assert config.model.delay_wgrad_compute == (name in FAST)
    assert bool(config.model.fp8) == ("_fp8" in name)


def test_every_upcycled_model_has_a_chain_with_its_baseline(numbers: dict[str, Any]) -> None:
    from nemo_run.cli.api import list_factories

    from nemo_upcycle.pipeline.bridge.pipeline import pipeline

    chains = [factory() for factory in list_factories(f"{pipeline.__module__}.{pipeline.__name__}")]
    assert {one.recipe for one in chains} == {known.bridge for known in known_recipes().values()} - {""}
    for one in chains:
        assert {one.recipe, one.dense_ct} <= set(ALL)
        dense = "_dense" if "_sft_" in one.recipe else "_dense_ct"
        assert _pair(one.dense_ct) == _pair(one.recipe).replace("_e8t2", dense)
        if (pair := _pair(one.recipe)) in numbers:  # Qwen3.5 has no pair in NeMo
            assert one.dense == numbers[pair]["resume.restore_config.path"]


def _part(name: str, part: str) -> str:
    found = _NAME.fullmatch(name)
    assert found
    return found[part]


def _pair(name: str) -> str:
    """Return the name of the NeMo recipe that has the same numbers as a Bridge recipe."""
    return _part(name, "recipe") + ("-fast" if "_fp8" in name else "")
