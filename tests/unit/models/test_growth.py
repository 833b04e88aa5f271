"""Grow a parent that has experts: which experts are copied, when the result is exact, and refusals."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.growth import growth_spec, inexact_because, needs_float32_routing, source_experts
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.online.upcycle import load_dense_into
from nemo_upcycle.utils.files import read_json
from tests.folders import change_config, change_weights, converted
from tests.loading.cases import logits
from tests.models import build_chunks, hugging_face_logits, moe_settings, sample_tokens, small_architecture, weights_of
from tests.parents import write_mixtral, write_moe, write_qwen3_moe


EXACT, VISIBLE = 2e-6, 1e-3
FIRST = {"router_order": "softmax_topk"}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("mixtral") / "dense")


def _grown(folder: Path, moe: Path, **fields: Any) -> float:
    """Convert, check that the stated exactness agrees with `verify`, and return the relative error of the logits."""
    spec = UpcycleSpec(**fields)
    done = converted(folder, moe, spec)
    arch = read_architecture(folder)
    assert (done.hf_class, done.exact) == (arch.hf_class, not inexact_because(arch, spec))
    utility = Path(spec.expert_utility) if spec.expert_utility else None
    assert verify(folder, moe, logits=False, expert_utility=utility).equal is done.exact
    assert read_architecture(moe).num_experts == spec.num_experts
    wanted, got = (logits(one, sample_tokens(250)) for one in (folder, moe))
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("chosen", "fields", "needs"),
    [
        (2, {"top_k": 4, "router_std": 0.0}, True),
        (2, {"top_k": 4}, False),
        (2, {"top_k": 3, "router_std": 0.0}, False),
        (4, {"top_k": 8, "router_std": 0.0}, False),
        (1, {"top_k": 2, "router_std": 0.0} | FIRST, True),
        (1, {"top_k": 1, "router_std": 0.0} | FIRST, False),
    ],
    ids=str,
)
def test_copies_are_chosen_together_in_float32(mixtral: Path, chosen: int, fields: Any, needs: bool) -> None:
    arch = replace(read_architecture(mixtral), top_k=chosen, norm_topk="router_order" not in fields)
    assert needs_float32_routing(arch, UpcycleSpec(num_experts=8, **fields)) is needs


@pytest.mark.parametrize(("chosen", "top_k", "scale"), [(1, 1, 2.0), (1, 2, 1.0), (4, 8, 1.0)])
def test_any_copy_will_do_where_a_parent_takes_one(tmp_path: Path, chosen: int, top_k: int, scale: float) -> None:
    folder = write_qwen3_moe(tmp_path / "dense", norm_topk_prob=False, num_experts_per_tok=chosen)
    fields = {"num_experts": 8, "top_k": top_k, "router_std": 0.0, "router_order": "softmax_topk"}
    error = _grown(folder, tmp_path / "moe", **fields)
    assert error <= EXACT
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    down = weights_of(tmp_path / "moe")[name]
    assert torch.equal(down, weights_of(folder)[name.replace("5", "1")] * scale)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"top_k": 2}, "top_k=4 would be exact"),
        ({"top_k": 3}, "best 1.5 experts, but the parent uses 2"),
        ({"top_k": 4, "method": "noise"}, "noise_std"),
    ],
)
def test_what_is_not_exact_is_told_and_shows(mixtral: Path, tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    spec = {"num_experts": 8, "router_std": 0.0} | fields
    assert why in " ".join(inexact_because(read_architecture(mixtral), UpcycleSpec(**spec)))
    assert _grown(mixtral, tmp_path / "moe", **spec) >= VISIBLE


def test_router_noise_separates_copies_and_changes_little(mixtral: Path, tmp_path: Path) -> None:
    moved = _grown(mixtral, tmp_path / "moe", num_experts=8, top_k=4)
    assert 0 < moved <= 0.1  # most of the error comes from a few tokens whose experts nearly tie
    name = "model.layers.0.block_sparse_moe.gate.weight"
    rows, own = (weights_of(one)[name].double() for one in (tmp_path / "moe", mixtral))
    first, second = rows.view(2, *own.shape)
    torch.testing.assert_close((first + second) / 2, own, rtol=0, atol=1e-7)
    assert float((first - second).std() / own.std()) == pytest.approx(0.02 * 2**0.5, rel=0.1)


def test_the_more_useful_experts_have_more_copies(mixtral: Path, tmp_path: Path) -> None:
    utility = tmp_path / "utility.yaml"
    utility.write_text("[[4, 1, 0.5, 3], [0, 0, 0, 9]]", encoding="utf-8")
    spec = growth_spec(read_architecture(mixtral), 7, 2, str(utility))
    arch = read_architecture(mixtral)
    assert source_experts(arch, spec, 0) == (0, 1, 2, 3, 0, 3, 0)
    assert Counter(source_experts(arch, spec, 1)) == {0: 1, 1: 1, 2: 1, 3: 4}
    fields = {"num_experts": 7, "top_k": 2, "router_std": 0.0, "expert_utility": str(utility)}
    assert _grown(mixtral, tmp_path / "moe", **fields) >= VISIBLE
    made, own = (weights_of(one) for one in (tmp_path / "moe", mixtral))
    for layer in (0, 1):
        begin = f"model.layers.{layer}.block_sparse_moe."
        for expert, source in enumerate(source_experts(arch, spec, layer)):
            assert torch.equal(made[begin + "gate.weight"][expert], own[begin + "gate.weight"][source])
            names = (f"{begin}experts.{number}.w2.weight" for number in (expert, source))
            assert torch.equal(made[next(names)], own[next(names)])


def test_a_conversion_goes_on_with_the_same_utilities_alone(mixtral: Path, tmp_path: Path) -> None:
    utility, moe = tmp_path / "utility.yaml", tmp_path / "moe"
    spec = UpcycleSpec(num_experts=6, expert_utility=str(utility))
    utility.write_text("[1, 2, 3, 4]", encoding="utf-8")
    first, again = (converted(mixtral, moe, spec, max_shard_bytes=100_000) for _ in range(2))
    assert (first.files_kept, again.files_kept, again.bytes_written) == (0, first.files, 0)
    utility.write_text("[4, 3, 2, 1]", encoding="utf-8")
    with pytest.raises(UpcycleError, match="made from other inputs"):
        converted(mixtral, moe, spec)


@pytest.mark.parametrize(
    ("utility", "got"),
    [
        ("[1, 2, 3]", "3 numbers"),
        ("[[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]", "3 lists"),
        ("[1, 2, -3, 4]", "-3"),
        ("text", "str"),
    ],
)
def test_utilities_that_do_not_fit_are_refused(mixtral: Path, tmp_path: Path, utility: str, got: str) -> None:
    path = tmp_path / "utility.yaml"
    path.write_text(utility, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        read_architecture(mixtral).upcycled(UpcycleSpec(num_experts=8, expert_utility=str(path)))
    assert caught.value.field == "expert_utility"
    assert got in str(caught.value.got)


@pytest.mark.parametrize(
    ("kind", "fields", "refused"),
    [
        ("Mixtral", {"num_experts": 6}, "num_experts"),
        ("Mixtral", {"num_experts": 4}, "num_experts"),
        ("Mixtral", {"granularity": 2}, "granularity"),
        ("Mixtral", {"moe_layers": "0"}, "moe_layers"),
        ("Mixtral", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ("Mixtral", {"top_k": 1, "router_order": "softmax_topk"}, "router_order"),
        ("Mixtral", {"top_k": 1, "router_score": "sigmoid"}, "router_score"),
        ("Mixtral", {"router_init": "prompts", "calibration": "file"}, "router_init"),
        ("Mixtral", {"expert_utility": "nowhere.yaml"}, "expert_utility"),
        ("Glm4Moe", {"top_k": 1, "router_order": "softmax_topk"}, "moe_layers"),
    ],
    ids=str,
)
def test_what_is_refused_works_once_fixed(mixtral: Path, glm4_moe: Path, kind: str, fields: Any, refused: str) -> None:
    arch = replace(read_architecture(mixtral if kind == "Mixtral" else glm4_moe), top_k=1)
    with pytest.raises(SpecError) as caught:
        arch.upcycled(UpcycleSpec(**({"num_experts": 8} | fields)))
    assert caught.value.field == refused
    fix = {name: yaml.safe_load(value) for name, value in re.findall(r"<(\w+)>=([\w.]+)", caught.value.fix)}
    fix |= {name: str(value) for name, value in fix.items() if name == "moe_layers"}
    if fix:
        assert arch.upcycled(UpcycleSpec(**({"num_experts": 8} | fields | fix))).hf_class == arch.hf_class


def test_refuses_utilities_of_a_dense_parent(mixtral: Path) -> None:
    with pytest.raises(SpecError, match="needs a parent with experts"):
        small_architecture().upcycled(UpcycleSpec(expert_utility="utility.yaml"))
    with pytest.raises(CheckpointError, match="Several parents cannot be mixed if one has experts"):
        open_dense([mixtral, mixtral])


@pytest.fixture(scope="module")
def glm4_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as GLM saves it: weights in bfloat16, biases in float32, and a layer for multi-token prediction."""
    folder = write_moe(tmp_path_factory.mktemp("glm4_moe") / "dense", kind="Glm4Moe")
    weights = {name: weight.bfloat16() for name, weight in weights_of(folder).items() if not name.endswith(BIAS)}
    change_weights(folder, weights | {"model.layers.2.eh_proj.weight": torch.ones(64, 128, dtype=torch.bfloat16)})
    return change_config(folder, num_nextn_predict_layers=1)


BIAS = "e_score_correction_bias"
GLM4 = UpcycleSpec(
    num_experts=8, top_k=4, router_std=0.0, router_score="sigmoid", routed_scaling_factor=2.5, moe_layers="1"
)


def test_biases_stay_float32_in_a_folder_of_bfloat16(glm4_moe: Path, tmp_path: Path) -> None:
    done = converted(glm4_moe, tmp_path / "moe", GLM4)
    assert (done.exact, done.dtype) == (True, "bfloat16")
    assert verify(glm4_moe, tmp_path / "moe", logits=False).equal
    made, own = (weights_of(one) for one in (tmp_path / "moe", glm4_moe))
    (name,) = (name for name in own if name.endswith(BIAS))
    assert torch.equal(made[name], own[name].repeat(2))
    assert {weight.dtype for other, weight in made.items() if other != name} == {torch.bfloat16}
    assert not any(".layers.2." in name for name in made)
    assert read_json(tmp_path / "moe/config.json")["num_nextn_predict_layers"] == 0
    wanted, got = (hugging_face_logits(one, sample_tokens(250)) for one in (glm4_moe, tmp_path / "moe"))
    assert float((got - wanted).norm() / wanted.norm()) <= EXACT
    change_weights(tmp_path / "moe", {name: made[name].bfloat16()})
    assert not verify(glm4_moe, tmp_path / "moe", logits=False).equal


@pytest.mark.usefixtures("megatron")
def test_no_cast_of_a_megatron_model_rounds_the_biases(glm4_moe: Path) -> None:
    (model,) = build_chunks(glm4_moe, **moe_settings(read_architecture(glm4_moe), GLM4))
    with open_dense(glm4_moe) as dense:
        assert upcycle_into([model], dense, GLM4).exact
    router, own = model.bfloat16().decoder.layers[1].mlp.router, weights_of(glm4_moe)
    assert torch.equal(router.expert_bias, own[f"model.layers.1.mlp.gate.{BIAS}"].repeat(2))
    assert router.weight.dtype is torch.bfloat16


@pytest.mark.usefixtures("megatron")
def test_refuses_models_without_room_for_biases_or_gate(glm4_moe: Path, tmp_path: Path) -> None:
    settings = moe_settings(read_architecture(glm4_moe), GLM4) | {"moe_router_enable_expert_bias": False}
    (model,) = build_chunks(glm4_moe, **settings)
    with open_dense(glm4_moe) as dense, pytest.raises(CheckpointError, match="enable_expert_bias is False"):
        upcycle_into([model], dense, GLM4)
    gated = write_moe(tmp_path / "dense", kind="Qwen2Moe")
    arch = read_architecture(gated)
    (model,) = build_chunks(replace(arch, shared_gate=False), num_experts=4, top_k=2)
    with open_dense(gated) as dense, pytest.raises(CheckpointError, match="shared_gate in layer 0"):
        load_dense_into([model], dense)


def test_copies_of_a_single_sigmoid_expert_are_exact(tmp_path: Path) -> None:
    folder = write_moe(tmp_path / "dense", kind="Glm4Moe", num_experts_per_tok=1)
    done = converted(folder, tmp_path / "moe", replace(GLM4, top_k=2))
    assert done.exact
    wanted, got = (hugging_face_logits(one, sample_tokens(250)) for one in (folder, done.output))
    assert float((got - wanted).norm() / wanted.norm()) <= EXACT
    # With top_k=1, the result is not exact, because Megatron does not divide a single sigmoid score by itself.
    assert not converted(folder, tmp_path / "one", replace(GLM4, top_k=1)).exact


def test_what_cannot_be_grown_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_moe(tmp_path / "dense", kind="Glm4Moe", norm_topk_prob=False)
    with pytest.raises(CheckpointError, match="do not sum to one"):
        open_dense(folder)
