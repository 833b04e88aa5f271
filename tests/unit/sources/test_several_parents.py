"""Mix several dense models: take experts from each model in turn, other weights from the first model or the mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError
from tests.folders import SPEC, change_config, change_weights, converted
from tests.models import build_chunks, require_same_weights, weights_of, write_llama


ATTENTION = "model.layers.1.self_attn.o_proj.weight"
NETWORK = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A seed model, and two models trained from it."""
    found = [write_llama(tmp_path / "first", layers=2)]
    for number in (1, 2):
        folder = Path(shutil.copytree(found[0], tmp_path / f"other{number}"))
        torch.manual_seed(number)
        moved = {name: tensor + torch.randn(tensor.shape) * 0.05 for name, tensor in weights_of(folder).items()}
        found.append(change_weights(folder, moved))
    return found


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("rest", ["first", "mean"])
def test_experts_come_from_the_parents_in_turn(folders: list[Path], tmp_path: Path, rest: str) -> None:
    (model,) = build_chunks(folders[0], num_experts=4)
    with open_dense(folders, non_expert_weights=rest) as dense:
        receipt = upcycle_into([model], dense, SPEC)
        convert(dense, tmp_path / "offline", SPEC, progress=False)
        arch = dense.architecture.upcycled(SPEC)
    export_weights(LiveWeights(model), arch, folders[0], tmp_path / "online", dtype=torch.float32)
    require_same_weights(tmp_path / "online", tmp_path / "offline")
    moe, *tensors = map(weights_of, (tmp_path / "offline", *folders))
    for expert in range(4):
        down = moe[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(down, tensors[expert % 3][NETWORK])
    mean = sum(each[ATTENTION].double() for each in tensors) / 3
    wanted = mean if rest == "mean" else tensors[0][ATTENTION].double()
    assert torch.allclose(moe[ATTENTION].double(), wanted, rtol=1e-6)
    assert not receipt.exact
    (reason,) = receipt.inexact_because
    assert ("the rest is their mean" if rest == "mean" else "the rest is the first one's") in reason
    assert set(receipt.source_files) == {f"{folder}/model.safetensors" for folder in folders}


def test_all_parts_of_one_network_come_from_one_model(folders: list[Path], tmp_path: Path) -> None:
    converted(folders, tmp_path / "moe", UpcycleSpec(num_experts=6, top_k=2, granularity=2))
    moe = weights_of(tmp_path / "moe")
    up = [weights_of(folder)["model.layers.1.mlp.up_proj.weight"].chunk(2) for folder in folders]
    for expert in range(6):
        copy, part = divmod(expert, 2)
        assert torch.equal(moe[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"], up[copy][part])


def test_a_mean_is_taken_in_float32_and_cast_back(folders: list[Path]) -> None:
    for folder in folders:
        change_weights(folder, {name: tensor.bfloat16() for name, tensor in weights_of(folder).items()})
    expected = sum(weights_of(folder)[ATTENTION].float() for folder in folders) / 3
    with open_dense(folders, non_expert_weights="mean") as dense:
        got = dense.read(ATTENTION, [(3, 9), (10, 40)])
        assert torch.equal(got, expected[3:9, 10:40].bfloat16())
        assert dense.bytes_read == 3 * got.nbytes
        assert [branch.path for branch in dense.branches()] == folders
    with open_dense(folders) as dense:
        assert torch.equal(dense.read(ATTENTION), weights_of(folders[0])[ATTENTION])
        assert dense.bytes_read == 64 * 64 * 2


def test_one_model_is_no_mixture(folders: list[Path]) -> None:
    with open_dense(folders[:1], non_expert_weights="mean") as dense:
        assert dense.branches() == (dense,)
        assert not dense.inexact_because()
    with pytest.raises(SpecError, match=r"'meen' does not exist\. Did you mean 'mean'"):
        open_dense(folders, non_expert_weights="meen")


@pytest.mark.parametrize(
    ("name", "value", "field", "first"),
    [
        ("num_hidden_layers", 3, "num_layers", 2),
        ("architectures", ["Qwen2ForCausalLM"], "hf_class", "LlamaForCausalLM"),
    ],
)
def test_architectures_must_agree(folders: list[Path], name: str, value: Any, field: str, first: object) -> None:
    change_config(folders[2], **{name: value})
    with pytest.raises(CheckpointError) as caught:
        open_dense(folders)
    assert caught.value.subject == f"{field} of {folders[2]}"
    assert str(caught.value.expected).startswith(str(first))


def test_tensors_must_agree(folders: list[Path]) -> None:
    tensor = weights_of(folders[1])[NETWORK]
    for changed, words in (
        (tensor.bfloat16(), r"Dtype of .*down_proj\.weight of .*other1 is torch\.bfloat16; expected torch\.float32"),
        (tensor.T.contiguous(), r"Shape of .*down_proj\.weight of .*other1 is \(96, 64\)"),
        (None, r"other1: tensor '.*down_proj\.weight' does not exist"),
    ):
        change_weights(folders[1], {NETWORK: changed})
        with pytest.raises(CheckpointError, match=words):
            open_dense(folders)
