"""Every parent: the folder that is converted from it, and Megatron's layers filled from it, compute what it does.

transformers' own classes give the parent's logits and those of the folder; what Megatron's layers hold is exported
with the bits of the conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.growth import inexact_because
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import window_fields
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.trainers.equivalence import megatron_logits
from nemo_upcycle.utils.files import read_json
from nemo_upcycle.verify.verification import verify
from tests.loading.cases import logits
from tests.models import (
    build_chunks,
    moe_settings,
    require_same_weights,
    sample_tokens,
    weights_of,
    write_exaone4,
    write_llama,
    write_olmo2,
    write_phi3,
    write_qwen2,
    write_qwen3,
    write_smollm3,
)
from tests.parents import (
    YARN,
    write_arcee,
    write_exaone3,
    write_gemma3,
    write_granite,
    write_granite4,
    write_internlm3,
    write_iquest_coder,
    write_mixtral,
    write_moe,
    write_olmo3,
    write_olmoe,
    write_qwen3_moe,
    write_seed_oss,
    write_wrapped,
)
from tests.tiers import quick


pytestmark = pytest.mark.usefixtures("megatron")
EXACT = 2e-6
COPIES = {"num_experts": 4, "top_k": 2}
FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}
SHARED = COPIES | {"granularity": 2, "shared_experts": 1}
SIGMOID = COPIES | {"router_score": "sigmoid", "routed_scaling_factor": 2.5}
ZERO = COPIES | {"router_order": "softmax_topk", "router_init": "zero"}
LONG = {"short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [2.0 + n for n in range(8)]}
LONGROPE = {"rope_scaling": LONG | {"type": "longrope"}, "original_max_position_embeddings": 16}
#: The same where three quarters of a head are turned.
SHORTER = LONGROPE | {"rope_scaling": {name: values[:6] for name, values in LONG.items()} | {"type": "longrope"}}
#: Of a parent with four experts.
GROWN = {"num_experts": 8, "top_k": 4, "router_std": 0.0}
FIRST = GROWN | {"router_order": "softmax_topk"}
BFLOAT16 = torch.bfloat16


class Parent(NamedTuple):
    """A parent, the class that holds its MoE ("": none), and whether Megatron's layers can be its.

    Args:
        write: writes a random one.
        hf_class: by transformers' name.
        spec: fields of the `UpcycleSpec`.
        online: whether a Megatron model of it can be built.
        dtype: type of what is made.
    """

    write: Callable[[Path], Path]
    hf_class: str
    spec: dict[str, Any] = COPIES
    online: bool = True
    dtype: torch.dtype = torch.float32


#: What `make test` runs.
PARENTS = {
    "OLMo 2": Parent(write_olmo2, "FlexOlmoForCausalLM", ZERO),
    "OLMo 2, biases": Parent(partial(write_olmo2, attention_bias=True), "FlexOlmoForCausalLM", FINE, online=False),
    "OLMo 3": Parent(write_olmo3, ""),
    "Phi-3.5, shared expert": Parent(partial(write_phi3, **LONGROPE), "Qwen2MoeForCausalLM", SHARED),
    "Phi-3, drop": Parent(write_phi3, "Qwen2MoeForCausalLM", SHARED | {"method": "drop"}),
    "Phi-4-mini, sigmoid": Parent(
        partial(write_phi3, partial_rotary_factor=0.75, **SHORTER), "Glm4MoeForCausalLM", SIGMOID
    ),
    "SmolLM3": Parent(write_smollm3, "GraniteMoeSWAForCausalLM"),
    "EXAONE 4": Parent(write_exaone4, ""),
    "Gemma 3": Parent(write_gemma3, ""),
    "Gemma 3 that sees": Parent(partial(write_wrapped, kind="Gemma3", tied=True), ""),
    "LLaVA": Parent(partial(write_wrapped, kind="Llava", tied=True), "MixtralForCausalLM"),
    "Qwen3-VL": Parent(partial(write_wrapped, kind="Qwen3VL"), "Qwen3VLMoeForConditionalGeneration", FINE),
    "Qwen2": Parent(partial(write_qwen2, tied=True, layers=2), "Qwen2MoeForCausalLM", FINE),
    "Qwen3, YaRN": Parent(partial(write_qwen3, layers=2, rope_scaling=YARN), "Qwen3MoeForCausalLM"),
    "Qwen3, biases": Parent(
        partial(write_qwen3, layers=2, attention_bias=True), "Qwen3MoeForCausalLM", FINE, online=False
    ),
    "Granite 3, tied and granular": Parent(partial(write_granite, tied=True), "GraniteMoeForCausalLM", FINE),
    "Granite 4, shared expert": Parent(write_granite4, "GraniteMoeSharedForCausalLM", SHARED),
    "EXAONE 3, shared expert": Parent(partial(write_exaone3, tied=True), "Qwen2MoeForCausalLM", SHARED),
    "Arcee": Parent(write_arcee, ""),
    "Seed-OSS, sigmoid": Parent(
        partial(write_seed_oss, layers=2, head_dim=32), "Glm4MoeForCausalLM", SIGMOID | {"shared_experts": 1}
    ),
    "Seed-OSS": Parent(partial(write_seed_oss, layers=2, head_dim=32), "GraniteMoeSWAForCausalLM", SHARED),
    "Llama, stretched": Parent(
        partial(write_llama, layers=2, rope_scaling={"rope_type": "linear", "factor": 3.0}), "MixtralForCausalLM"
    ),
    "Llama, tied": Parent(partial(write_llama, layers=2, tied=True), "Qwen2MoeForCausalLM", ZERO),
    "Llama, mixed": Parent(
        partial(write_llama, layers=2), "Qwen2MoeForCausalLM", COPIES | {"moe_layers": "0"}, dtype=BFLOAT16
    ),
    "Llama, noise": Parent(
        partial(write_llama, layers=2), "MixtralForCausalLM", COPIES | {"method": "noise", "router_init": "uniform"}
    ),
    "Llama, granular drop": Parent(
        partial(write_llama, layers=2), "MixtralForCausalLM", FINE | {"method": "drop"}, dtype=BFLOAT16
    ),
    "Mixtral, noise": Parent(write_mixtral, "MixtralForCausalLM", GROWN | {"method": "noise", "router_std": 0.02}),
    "Qwen2-MoE": Parent(partial(write_moe, kind="Qwen2Moe"), "Qwen2MoeForCausalLM", FIRST),
    "Glm4-MoE": Parent(
        partial(write_moe, kind="Glm4Moe"), "Glm4MoeForCausalLM", SIGMOID | GROWN | {"moe_layers": "1"}
    ),
    "FlexOlmo": Parent(partial(write_moe, kind="FlexOlmo"), "FlexOlmoForCausalLM", FIRST),
    "OLMoE, drop": Parent(partial(write_olmoe, norm_topk_prob=True), "OlmoeForCausalLM", GROWN | {"method": "drop"}),
    "Qwen3-MoE, dense layer": Parent(
        partial(write_qwen3_moe, mlp_only_layers=[0]),
        *("Qwen3MoeForCausalLM", GROWN | {"num_experts": 12, "top_k": 6, "moe_layers": "1"}),
    ),
}
WEEKLY = {
    "Qwen3-VL, drop": Parent(
        partial(write_wrapped, kind="Qwen3VL"), "Qwen3VLMoeForConditionalGeneration", FINE | {"method": "drop"}
    ),
    "OLMo 3, windows everywhere": Parent(partial(write_olmo3, layer_types=["sliding_attention"] * 4), ""),
    "OLMo 3, YaRN": Parent(partial(write_olmo3, rope_scaling=YARN | {"attention_factor": 1.2}), ""),
    "Phi-3.5, short": Parent(
        partial(write_phi3, **(LONGROPE | {"original_max_position_embeddings": 128, "max_position_embeddings": 512})),
        "MixtralForCausalLM",
    ),
    "Phi-4-mini": Parent(partial(write_phi3, partial_rotary_factor=0.75, tied=True, **SHORTER), ""),
    "EXAONE 4, no window": Parent(partial(write_exaone4, window=None, layer_types=["full_attention"] * 4), ""),
    "InternLM3": Parent(
        partial(write_internlm3, rope_scaling={"rope_type": "dynamic", "factor": 6.0}), "MixtralForCausalLM"
    ),
    "IQuest-Coder": Parent(write_iquest_coder, "MixtralForCausalLM", FINE),
    "Granite 3, biases": Parent(partial(write_granite, attention_bias=True), "GraniteMoeForCausalLM", online=False),
    "Qwen3-MoE, softmax first": Parent(partial(write_qwen3_moe, norm_topk_prob=False), "Qwen3MoeForCausalLM", FIRST),
}


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", quick([*PARENTS, *WEEKLY], *PARENTS))
def test_what_is_made_of_a_parent_computes_what_it_does(tmp_path: Path, name: str) -> None:
    row = (PARENTS | WEEKLY)[name]
    folder, spec = row.write(tmp_path / "dense"), UpcycleSpec(**row.spec)
    arch, wanted = read_architecture(folder), logits(folder, sample_tokens(250))
    numbers = sum(weight.numel() for key, weight in weights_of(folder).items() if not key.endswith("correction_bias"))
    assert arch.total_params == numbers
    is_exact = row.dtype is torch.float32 and not inexact_because(arch, spec)
    if row.hf_class:
        with open_dense(folder) as dense:
            done = convert(dense, tmp_path / "offline", spec, dtype=row.dtype, progress=False)
        assert (read_architecture(tmp_path / "offline").hf_class, done.exact) == (row.hf_class, is_exact)
        assert verify(folder, tmp_path / "offline", logits=False).equal is is_exact
        if is_exact and hasattr(transformers, row.hf_class):
            assert _error(logits(tmp_path / "offline", sample_tokens(250)), wanted) <= EXACT
    else:
        with open_dense(folder) as dense, pytest.raises(SpecError, match="Hugging Face class for this MoE"):
            convert(dense, tmp_path / "offline", spec, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    _check_online(row, folder, wanted if is_exact else None, tmp_path)


def _check_online(row: Parent, folder: Path, wanted: torch.Tensor | None, output: Path) -> None:
    """Check Megatron's model of the parent and the MoE model: what they compute, and what they are exported as."""
    spec, arch, window = UpcycleSpec(**row.spec), read_architecture(folder), window_fields(read_architecture(folder))
    counts = {"num_experts": arch.num_experts} | ({"top_k": arch.top_k} if arch.num_experts else {})
    (model,) = build_chunks(folder, **moe_settings(arch, spec), **window, params_dtype=row.dtype)
    if not row.online:  # Megatron has one setting for the biases of the attention's output and of the experts
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match="bias"):
            upcycle_into([model], dense, spec)
        return
    (own,) = build_chunks(folder, **(moe_settings(arch, spec) if arch.num_experts else {}) | counts, **window)
    with open_dense(folder) as dense:
        assert load_dense_into([own], dense).exact
        receipt = upcycle_into([model], dense, spec)
    assert receipt.exact is (wanted is not None)
    assert receipt.bytes_read == receipt.bytes_needed or spec.method != "copy"  # which look at what they change
    for made in (own, model) if wanted is not None else ():
        assert _error(megatron_logits(made.eval(), sample_tokens(250))[..., :250], wanted) <= EXACT
    export_weights(LiveWeights(own), arch, folder, output / "own", dtype=torch.float32)
    require_same_weights(folder, output / "own")
    if row.hf_class:
        export_weights(LiveWeights(model), arch.upcycled(spec), folder, output / "online", dtype=row.dtype)
        require_same_weights(output / "offline", output / "online")
        assert read_json(output / "online/config.json") == read_json(output / "offline/config.json")


def test_norms_in_other_places_are_no_place_for_a_parents(tmp_path: Path) -> None:
    olmo2, llama = write_olmo2(tmp_path / "olmo2"), write_llama(tmp_path / "llama", layers=2)
    for folder, other in ((olmo2, llama), (llama, olmo2)):
        (model,) = build_chunks(other, num_experts=None)
        before = [parameter.clone() for parameter in model.parameters()]
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match=r"qk_layernorm|without a source"):
            load_dense_into([model], dense)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    with pytest.raises(CheckpointError, match="Fix: omit hybrid_layer_pattern"):
        megatron_fields(read_architecture(olmo2), hybrid=True)


def test_longrope_needs_its_factor_and_its_frequencies(tmp_path: Path) -> None:
    folder = write_phi3(tmp_path / "dense", **LONGROPE)
    plain, fused, other = (build_chunks(folder, num_experts=None)[0] for _ in range(3))
    plain.config.yarn_mscale = 0.0
    fused.config.apply_rope_fusion = True
    other.rotary_pos_emb.inv_freq = other.rotary_pos_emb.inv_freq * 2
    words = ("yarn_mscale: got a factor of 1, expected", "apply_rope_fusion: got True", "rotary_base and RoPE scaling")
    for model, text in zip((plain, fused, other), words, strict=True):
        with open_dense(folder) as dense, pytest.raises(CheckpointError, match=text):
            load_dense_into([model], dense)


def test_a_scaling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "dense", rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    (model,) = build_chunks(write_llama(tmp_path / "plain"), num_experts=None)
    with open_dense(folder) as dense, pytest.raises(CheckpointError, match="rope_scaling: got dynamic, expected"):
        load_dense_into([model], dense)


def test_both_names_of_longrope_are_one(tmp_path: Path) -> None:
    named = {"rope_scaling": LONG | {"type": "su"}, "original_max_position_embeddings": 16}
    scaling = read_architecture(write_phi3(tmp_path / "dense", **named)).rope_scaling
    assert scaling == LONG | {"rope_type": "longrope", "original_max_position_embeddings": 16}
