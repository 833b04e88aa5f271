"""Online upcycling on real gloo ranks: the gathered model is bit-identical under every layout.

Every layout is started once and upcycles all `CASES`. The networks are wider than a block of random numbers, and
layouts cut blocks in the middle. The padding of the vocabulary differs for each tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.init.experts import BLOCK
from nemo_upcycle.models.layer_settings import window_fields
from tests.distributed.gather import GlobalShard, gather, global_shards
from tests.distributed.ranks import run_ranks
from tests.models import build_chunks, moe_settings, write_llama, write_olmo2, write_phi3, write_qwen3
from tests.parents import write_mixtral, write_moe, write_qwen3_moe, write_wrapped
from tests.tiers import quick
from tests.unit.online.samples import made


Reference = dict[str, dict[str, torch.Tensor]]
WIDTH = 2 * BLOCK + 128
SIZES = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": WIDTH, "head_dim": 4}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4}
PARENTS = {"untied": {}, "tied": {"tied": True}, "biases": {"attention_bias": True, "mlp_bias": True}}


def _four_heads(write: Callable[..., Path], folder: Path, **settings: Any) -> Path:
    """Write a model with four heads: in its class, all heads together must be as wide as the hidden size."""
    return write(folder, **(settings | {"num_attention_heads": 4}))


WRITERS = {
    "qwen3": write_qwen3,
    "olmo2": write_olmo2,
    "phi3": write_phi3,
    "mixtral": write_mixtral,
    "qwen3_moe": partial(write_qwen3_moe, moe_intermediate_size=WIDTH),
    "qwen2_moe": partial(_four_heads, write_moe, kind="Qwen2Moe"),
}
#: Class -> multimodal class around it, or "" if the class itself is multimodal and has its usual text model.
SEEING = {"Mistral3": "", "Ministral3": "Mistral3", "Qwen2_5_VL": "", "Qwen3VL": "", "Gemma3": "", "Exaone4_5_": ""}
SEEING = {name: around for name, around in SEEING.items() if hasattr(transformers, f"{name}Config")}
WRITERS |= {
    name: partial(_four_heads, write_wrapped, kind=around or name, text=name if around else "")
    for name, around in SEEING.items()
}
COPIES = {"num_experts": 4, "top_k": 2}
GRANULAR = {"num_experts": 8, "top_k": 4, "granularity": 2}
#: The calibration file is made from the untied parent, and is in the folder of the parents.
FROM_DATA = UpcycleSpec(**GRANULAR, shared_experts=1, router_init="prompts", calibration="untied.file")
CASES = {
    "Qwen3": ("qwen3", UpcycleSpec(**COPIES)),
    "OLMo 2": ("olmo2", UpcycleSpec(**COPIES)),
    "Phi-3": ("phi3", UpcycleSpec(**COPIES)),
    "copy": ("untied", UpcycleSpec(**COPIES)),
    "copy, tied": ("tied", UpcycleSpec(**COPIES)),
    "noise": ("untied", UpcycleSpec(**COPIES, method="noise")),
    "drop": ("untied", UpcycleSpec(**COPIES, method="drop")),
    "granular": ("untied", UpcycleSpec(**GRANULAR)),
    "more experts": ("mixtral", UpcycleSpec(num_experts=8, top_k=4)),
    "more experts, noise": ("qwen3_moe", UpcycleSpec(num_experts=8, top_k=4, method="noise")),
    "more experts, gate": ("qwen2_moe", UpcycleSpec(num_experts=8, top_k=4, router_order="softmax_topk")),
    "granular, biases": ("biases", UpcycleSpec(**GRANULAR, method="noise")),
    "shared": ("untied", UpcycleSpec(**GRANULAR, shared_experts=1, method="drop")),
    "mixed": ("tied", UpcycleSpec(**GRANULAR, moe_layers=(0, 3), method="noise")),
    "from data": ("untied", FROM_DATA),
} | {name: (name, UpcycleSpec(**COPIES)) for name in SEEING}
LAYOUTS: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (2, {}, {}),  # two data-parallel replicas
    (2, {"tp": 2}, {}),  # with sequence parallelism, like every layout with tensor parallelism here
    (2, {"cp": 2}, {}),
    (2, {"pp": 2, "vp": 2}, {}),
    (2, {"ep": 2}, {}),
    (2, {"etp": 2}, {}),
    (4, {"cp": 2, "ep": 4}, {}),
    (4, {"tp": 4, "ep": 2, "etp": 2}, {}),
    (2, {"pp": 2}, {"num_layers_in_first_pipeline_stage": 3}),
    (3, {"pp": 3}, {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}),
    (2, {"pp": 2}, {"pipeline_model_parallel_layout": "Et|tttL"}),
    (8, {"tp": 2, "pp": 2, "ep": 2}, {"num_layers_in_last_pipeline_stage": 1}),
    (8, {"tp": 2, "pp": 2, "vp": 2, "ep": 2, "etp": 2}, {}),
]


def _cases(layout: dict[str, int]) -> dict[str, tuple[str, UpcycleSpec]]:
    """Return the cases that Megatron can build: experts have biases only without expert-tensor parallelism."""
    return {name: case for name, case in CASES.items() if case[0] != "biases" or layout.get("etp", 1) == 1}


def _upcycle(folder: str, layout: dict[str, int], changes: dict[str, Any], cases: dict) -> dict[str, dict[str, Any]]:
    answers = {}
    for name, (parent, spec) in cases.items():
        with open_dense(f"{folder}/{parent}") as dense:
            if spec.needs_calibration:
                spec = replace(spec, calibration=f"{folder}/{parent}.file")
            settings = moe_settings(dense.architecture, spec) | window_fields(dense.architecture) | changes
            chunks = build_chunks(dense.architecture, layout=layout, **settings)
            receipt = upcycle_into(chunks, dense, spec)
        read = receipt.bytes_read, receipt.bytes_needed
        answers[name] = {"shards": global_shards(chunks), "read": read}
    return answers


def _fit(whole: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Cut off the vocabulary padding, which depends on the tensor-parallel size and must be zero."""
    if whole.shape != reference.shape:
        assert whole[reference.shape[0] :].abs().sum() == 0
        return whole[: reference.shape[0]]
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    for name, changes in PARENTS.items():
        write_llama(folder / name, shards=3, **(SIZES | changes))
    for name, write in WRITERS.items():
        write(folder / name, layers=4, **SIZES)
    made(folder / "untied", folder / "untied.file", FROM_DATA)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    ranks = run_ranks(_upcycle, 1, str(folder), {}, {}, CASES)
    return {case: gather([rank[case]["shards"] for rank in ranks]) for case in CASES}


@pytest.mark.parametrize(
    ("ranks", "layout", "changes"),
    quick(LAYOUTS, (2, {"pp": 2, "vp": 2}, {}), (4, {"tp": 4, "ep": 2, "etp": 2}, {})),
    ids=lambda value: str(value).replace("'", ""),
)
def test_gathered_bits_do_not_depend_on_the_layout(
    folder: Path, reference: Reference, ranks: int, layout: dict[str, int], changes: dict[str, Any]
) -> None:
    answers = run_ranks(_upcycle, ranks, str(folder), layout, changes, _cases(layout))
    for case, (parent, spec) in _cases(layout).items():
        gathered = gather([answer[case]["shards"] for answer in answers])
        copied_output = {"output_layer.weight"} if parent == "tied" else set()  # on the last pipeline stage
        assert gathered.keys() - copied_output == reference[case].keys() - copied_output
        for key, expected in reference[case].items():
            assert torch.equal(_fit(gathered[key], expected), expected), f"{key} of {case}"
        for key in copied_output & gathered.keys():
            embedding = gathered["embedding.word_embeddings.weight"]
            assert torch.equal(gathered[key], embedding), f"{key} of {case}"
        for answer in answers:
            # Noise and drop read whole matrices, although tensor parallelism gives a rank only a part.
            read, needed = answer[case]["read"]
            assert read == needed or spec.method != "copy"


def _upcycle_before_a_step(folder: str, distributed: bool) -> tuple[list[GlobalShard], list[GlobalShard]]:
    """Upcycle a model whose parameters are in the optimizer's buffers, and take a step at learning rate zero."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    spec = CASES["shared"][1]
    with open_dense(f"{folder}/untied") as dense:
        settings = moe_settings(dense.architecture, spec) | {"bf16": True, "params_dtype": torch.bfloat16}
        chunks = build_chunks(dense.architecture, layout={"ep": 2}, **settings)
        buffers = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        wrapped = [DistributedDataParallel(chunk.config, buffers, chunk.bfloat16()) for chunk in chunks]
        options = OptimizerConfig(
            optimizer="adam", lr=0.0, weight_decay=0.0, bf16=True, use_distributed_optimizer=distributed, clip_grad=0.0
        )
        optimizer = get_megatron_optimizer(options, wrapped)
        upcycle_into(wrapped, dense, spec)
    optimizer.reload_model_params()
    before = global_shards(chunks)
    for model in wrapped:
        model.zero_grad_buffer()
        for parameter in model.parameters():
            parameter.main_grad.zero_()
    optimizer.step()  # copies the optimizer's float32 weights back into the model
    return before, global_shards(chunks)


@pytest.mark.parametrize("distributed", quick([False, True], True), ids=["plain optimizer", "distributed optimizer"])
def test_parameters_in_an_optimizers_buffers_are_filled(folder: Path, reference: Reference, distributed: bool) -> None:
    answers = run_ranks(_upcycle_before_a_step, 4, str(folder), distributed)
    before, after = (gather([answer[time] for answer in answers]) for time in (0, 1))
    assert before.keys() == after.keys() == reference["shared"].keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
        if "experts" not in key:  # experts round differently: they are scaled, or redrawn from bfloat16 statistics
            assert torch.equal(value, reference["shared"][key].bfloat16().float()), key
