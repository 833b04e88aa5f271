"""Parents, and the Hugging Face class of the MoE that is made from each parent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests import models, parents


COPIES = {"num_experts": 4, "top_k": 2}
FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}
SHARED = COPIES | {"granularity": 2, "shared_experts": 1}
#: Scaling factor, used with classes that have no setting for such a factor.
SCALED = {"routed_scaling_factor": 2.5}
SIGMOID = COPIES | {"router_score": "sigmoid", "routed_scaling_factor": 2.5}
ZERO = COPIES | {"router_order": "softmax_topk", "router_init": "zero"}
LONG = {"short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [2.0 + n for n in range(8)]}
LONGROPE = {"rope_scaling": LONG | {"type": "longrope"}, "original_max_position_embeddings": 16}
#: LongRoPE for models that rotate three quarters of each head.
SHORTER = LONGROPE | {"rope_scaling": {name: values[:6] for name, values in LONG.items()} | {"type": "longrope"}}
LLAMA = partial(models.write_llama, layers=2)
QWEN3 = partial(models.write_qwen3, layers=2)
SEED_OSS = partial(parents.write_seed_oss, layers=2, head_dim=32)
#: Spec for a parent that has four experts.
GROWN = {"num_experts": 8, "top_k": 4, "router_std": 0.0}
FIRST = GROWN | {"router_order": "softmax_topk"}
BFLOAT16 = torch.bfloat16


class Parent(NamedTuple):
    """A parent, the spec of its MoE, and the classes that can represent them.

    Args:
        write: function that writes a random parent.
        hf_class: transformers' class for the MoE, "" if no class can represent it.
        spec: fields of the `UpcycleSpec`.
        online: whether a Megatron model of the parent can be built.
        dtype: dtype of the converted model.
    """

    write: Callable[[Path], Path]
    hf_class: str
    spec: dict[str, Any] = COPIES
    online: bool = True
    dtype: torch.dtype = torch.float32


#: Rows that `make test` runs.
PARENTS = {
    "OLMo 2": Parent(models.write_olmo2, "FlexOlmoForCausalLM", ZERO),
    "OLMo 2, biases": Parent(
        partial(models.write_olmo2, attention_bias=True), "FlexOlmoForCausalLM", FINE, online=False
    ),
    "OLMo 3": Parent(parents.write_olmo3, ""),
    "Phi-3.5, shared expert": Parent(partial(models.write_phi3, **LONGROPE), "Qwen2MoeForCausalLM", SHARED),
    "Phi-3, drop": Parent(models.write_phi3, "Qwen2MoeForCausalLM", SHARED | {"method": "drop"}),
    "Phi-4-mini, sigmoid": Parent(
        partial(models.write_phi3, partial_rotary_factor=0.75, **SHORTER), "Glm4MoeForCausalLM", SIGMOID
    ),
    "SmolLM3": Parent(models.write_smollm3, "GraniteMoeSWAForCausalLM"),
    "EXAONE 4": Parent(models.write_exaone4, ""),
    "Gemma 3": Parent(parents.write_gemma3, ""),
    "Gemma 3 that sees": Parent(partial(parents.write_wrapped, kind="Gemma3", tied=True), ""),
    "LLaVA": Parent(partial(parents.write_wrapped, kind="Llava", tied=True), "MixtralForCausalLM"),
    "Qwen3-VL": Parent(partial(parents.write_wrapped, kind="Qwen3VL"), "Qwen3VLMoeForConditionalGeneration", FINE),
    "Qwen2": Parent(partial(models.write_qwen2, tied=True, layers=2), "Qwen2MoeForCausalLM", FINE | SCALED),
    "Qwen3, YaRN": Parent(partial(QWEN3, rope_scaling=parents.YARN), "Qwen3MoeForCausalLM"),
    "Qwen3, biases": Parent(partial(QWEN3, attention_bias=True), "Qwen3MoeForCausalLM", FINE, online=False),
    "Granite 3, tied and granular": Parent(partial(parents.write_granite, tied=True), "GraniteMoeForCausalLM", FINE),
    "Granite 3, sigmoid": Parent(parents.write_granite, "Glm4MoeForCausalLM", SIGMOID | {"shared_experts": 1}),
    "Granite 3, dense layer": Parent(
        partial(parents.write_granite, tied=True), "Qwen2MoeForCausalLM", SHARED | {"moe_layers": "0"}
    ),
    "GraniteSWA": Parent(parents.write_granite_swa, "GraniteMoeSWAForCausalLM", SHARED),
    "Gemma": Parent(parents.write_gemma, "MixtralForCausalLM", FINE | SCALED),
    "Granite 4, shared expert": Parent(parents.write_granite4, "GraniteMoeSharedForCausalLM", SHARED),
    "EXAONE 3, shared expert": Parent(
        partial(parents.write_exaone3, tied=True), "Qwen2MoeForCausalLM", SHARED | SCALED
    ),
    "Arcee": Parent(parents.write_arcee, ""),
    "Seed-OSS, sigmoid": Parent(SEED_OSS, "Glm4MoeForCausalLM", SIGMOID | {"shared_experts": 1}),
    "Seed-OSS": Parent(SEED_OSS, "GraniteMoeSWAForCausalLM", SHARED),
    "Llama, stretched": Parent(
        partial(LLAMA, rope_scaling={"rope_type": "linear", "factor": 3.0}), "MixtralForCausalLM"
    ),
    "Llama, tied": Parent(partial(LLAMA, tied=True), "Qwen2MoeForCausalLM", ZERO),
    "Llama, mixed": Parent(LLAMA, "Qwen2MoeForCausalLM", COPIES | SCALED | {"moe_layers": "0"}, dtype=BFLOAT16),
    "Llama, noise": Parent(LLAMA, "MixtralForCausalLM", COPIES | {"method": "noise", "router_init": "uniform"}),
    "Llama, granular drop": Parent(LLAMA, "MixtralForCausalLM", FINE | {"method": "drop"}, dtype=BFLOAT16),
    "Mixtral, noise": Parent(
        parents.write_mixtral, "MixtralForCausalLM", GROWN | {"method": "noise", "router_std": 0.02}
    ),
    "Qwen2-MoE": Parent(partial(parents.write_moe, kind="Qwen2Moe"), "Qwen2MoeForCausalLM", FIRST),
    "Glm4-MoE": Parent(
        partial(parents.write_moe, kind="Glm4Moe"), "Glm4MoeForCausalLM", SIGMOID | GROWN | {"moe_layers": "1"}
    ),
    "FlexOlmo": Parent(partial(parents.write_moe, kind="FlexOlmo"), "FlexOlmoForCausalLM", FIRST),
    "OLMoE, drop": Parent(
        partial(parents.write_olmoe, norm_topk_prob=True), "OlmoeForCausalLM", GROWN | {"method": "drop"}
    ),
    "Qwen3-MoE, dense layer": Parent(
        partial(parents.write_qwen3_moe, mlp_only_layers=[0]),
        *("Qwen3MoeForCausalLM", GROWN | {"num_experts": 12, "top_k": 6, "moe_layers": "1"}),
    ),
}
WEEKLY = {
    "OLMo 3, YaRN": Parent(partial(parents.write_olmo3, rope_scaling=parents.YARN | {"attention_factor": 1.2}), ""),
    "Phi-3.5, short": Parent(
        partial(
            models.write_phi3, **(LONGROPE | {"original_max_position_embeddings": 128, "max_position_embeddings": 512})
        ),
        "MixtralForCausalLM",
    ),
    "EXAONE 4, no window": Parent(partial(models.write_exaone4, window=None, layer_types=["full_attention"] * 4), ""),
    "MiMo": Parent(partial(parents.write_mimo, layers=2, predicts=False), "Glm4MoeForCausalLM", SIGMOID),
    "InternLM3": Parent(
        partial(parents.write_internlm3, rope_scaling={"rope_type": "dynamic", "factor": 6.0}), "MixtralForCausalLM"
    ),
    "Qwen3-MoE, softmax first": Parent(
        partial(parents.write_qwen3_moe, norm_topk_prob=False), "Qwen3MoeForCausalLM", FIRST
    ),
}
