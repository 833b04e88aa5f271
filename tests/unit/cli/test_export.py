"""`export`: which checkpoint it reads, and how it uses and checks the receipt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.convert.found import find_checkpoint
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.checks import check_source
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.files import MODEL_MARKER
from tests.folders import SPEC
from tests.parents import write_wrapped
from tests.unit.cli.conftest import Command, refused
from tests.unit.convert.exports import write_checkpoint
from tests.unit.sources.test_checkpoint_context import _megatron
from tests.unit.sources.test_checkpoints import write


SAID = ("--experts", "4", "--top-k", "2", "--router-order", "topk_softmax")


@pytest.fixture(scope="module")
def checkpoint(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "pretrain/ck", dense, SPEC)


@pytest.fixture
def typed(checkpoint: Path, dense: Path, tmp_path: Path) -> tuple[str, ...]:
    return "export", str(checkpoint), str(tmp_path / "hf"), "--dense", str(dense)


def _receipt(folder: Path, content: Any) -> str:
    (folder / "receipt.json").write_text(json.dumps(content))
    return str(folder / "receipt.json")


@pytest.mark.parametrize(
    ("receipt", "said"),
    [
        ({"spec": [1]}, "receipt.json is not the receipt of an upcycling"),
        ({"spec": {"num_experts": 4, "new_field": 1}}, "unexpected keyword argument 'new_field'"),
    ],
)
def test_a_receipt_that_is_none_is_told(typed: tuple[str, ...], tmp_path: Path, receipt: Any, said: str) -> None:
    assert said in str(refused(*typed, "--receipt", _receipt(tmp_path, receipt)))
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"]


@pytest.mark.parametrize(
    ("option", "value", "expected"), [("--top-k", "4", 2), ("--router-order", "softmax_topk", "topk_softmax")]
)
def test_an_option_that_contradicts_the_receipt_is_refused(
    typed: tuple[str, ...], tmp_path: Path, command: Command, option: str, value: str, expected: object
) -> None:
    receipt = ("--receipt", _receipt(tmp_path, {"spec": {"num_experts": 4, "top_k": 2}}))
    error = refused(*typed, *receipt, option, value)
    assert (error.subject, str(error.got)) == (option, value)
    assert str(error.expected).startswith(f"{expected}, as in ")
    assert not (tmp_path / "hf").exists()
    command.text(*typed, *receipt, option, str(expected))


def test_a_runs_receipt_says_spec_and_parent(checkpoint: Path, dense: Path, tmp_path: Path, command: Command) -> None:
    run = shutil.copytree(checkpoint.parents[1], tmp_path / "run")
    _receipt(run, {"spec": {"num_experts": 4, "top_k": 2}, "source": str(dense)})
    found = command.values("export", str(run / "pretrain/ck"), str(tmp_path / "hf"))
    assert (found["hf_class"], found["dense"]) == ("MixtralForCausalLM", str(dense))


def test_what_no_tensor_shows_must_be_said(typed: tuple[str, ...], tmp_path: Path, command: Command) -> None:
    """The checkpoint has no context, arguments or receipt, so a wrong router order would go unnoticed."""
    assert refused(*typed, "--experts", "4").fix.startswith("add --top-k and --router-order, or --receipt FILE")
    assert not (tmp_path / "hf").exists()
    command.text(*typed, *SAID[:-1], "softmax_topk")
    assert json.loads((tmp_path / "hf/config.json").read_text())["norm_topk_prob"] is False


@pytest.mark.parametrize(
    ("kind", "more", "hf_class", "note"),
    [
        ("Qwen3VL", (), "Qwen3VLMoeForConditionalGeneration", "llama.cpp, SGLang: not tried"),
        ("Mistral3", ("--text-only",), "MixtralForCausalLM", ""),
        ("Qwen2_5_VL", (), "Qwen2MoeForCausalLM", "only the text model: no known class has both visual and experts"),
    ],
)
def test_exports_a_vision_parent_whole_or_its_text_model(
    tmp_path: Path, command: Command, kind: str, more: tuple[str, ...], hf_class: str, note: str
) -> None:
    dense = write_wrapped(tmp_path / "dense", kind)
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    typed = ("export", str(checkpoint), str(tmp_path / "hf"), "--dense", str(dense), *SAID, *more)
    found = command.values(*typed)
    assert found["hf_class"] == hf_class
    assert note in " ".join(found["notes"])
    with SafetensorsFolder(tmp_path / "hf") as made:
        check_source(made)
        assert bool(made.others()) is hf_class.endswith("ForConditionalGeneration")


def test_options_and_receipt_must_agree_with_the_context(dense: Path, tmp_path: Path, command: Command) -> None:
    checkpoint = _megatron(tmp_path / "ck", dense, moe_router_topk=3)
    typed = ("export", str(checkpoint), str(tmp_path / "hf"), "--dense", str(dense))
    (tmp_path / "other").mkdir()
    receipt = _receipt(tmp_path / "other", {"spec": {"num_experts": 4, "top_k": 2}})
    for words, field in ((("--top-k", "2"), "--top-k"), (("--receipt", receipt), "top_k")):
        error = refused(*typed, *words)
        assert (error.subject, error.got) == (field, 2)
        assert str(error.expected).startswith("3, as moe_router_topk in ")
    command.text(*typed, "--experts", "4")  # an omitted option contradicts nothing
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_experts_per_tok"] == 3


def test_rounding_is_named_in_json_and_marker(typed: tuple[str, ...], tmp_path: Path, command: Command) -> None:
    (rounded,) = command.values(*typed, *SAID)["rounded"]
    assert rounded.startswith("float32 weights are rounded to bfloat16 (model.embed_tokens.weight and ")
    assert json.loads((tmp_path / "hf" / MODEL_MARKER).read_text())["rounded"] == [rounded]
    assert "rounded" not in command.text(*typed, *SAID, "--dtype", "float32")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A pipeline run with four checkpoints: 9 and 10 are complete, 11 lacks `common.pt`, and 12 is unfinished."""
    for stage in ("pretrain", "dense_ct"):
        folder = tmp_path / "runs/mine" / stage / "checkpoints"
        for step, ending in ((9, ""), (10, "-last"), (11, ""), (12, "-last")):
            write(folder, step, ending)
        (folder / "model_name=0--step=11/weights/common.pt").unlink()
        (folder / "model_name=0--step=12-last-unfinished").touch()
    return tmp_path / "runs/mine"


@pytest.mark.parametrize("where", ["", "pretrain/checkpoints/last", ".."])
def test_the_newest_complete_checkpoint_of_a_run_is_found(runs: Path, where: str) -> None:
    if where == "..":
        shutil.rmtree(runs / "dense_ct")
    assert find_checkpoint(runs / where).resolve() == runs / "pretrain/checkpoints/model_name=0--step=10-last"


@pytest.mark.parametrize(
    ("where", "got"),
    [
        ("pretrain/checkpoints/model_name=0--step=12-last", "is being written or removed"),
        ("logs", "has no finished checkpoint (a.log)"),
        ("..", "has several checkpoints (mine/dense_ct/checkpoints/model_name=0--step=10-last, mine/pretrain/"),
    ],
)
def test_what_is_no_checkpoint_is_told_with_what_is_there(runs: Path, where: str, got: str) -> None:
    (runs / "logs").mkdir()
    (runs / "logs/a.log").touch()
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(runs / where)
    assert str(caught.value.got).startswith(got)
