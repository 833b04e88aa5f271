"""`export`: what stands in a receipt is checked, and a mistake there is one message."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.cli.main import main
from nemo_upcycle.utils.files import MARKER, MODEL_MARKER
from tests.models import write_llama
from tests.unit.convert.test_export import SPEC, write_checkpoint


SAID = ("--experts", "4", "--top-k", "2", "--router-order", "topk_softmax")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    dense = write_llama(folder / "dense", layers=2)
    write_checkpoint(folder / "pretrain/ck", dense, SPEC)
    return folder


def _export(run: Path, output: Path, *words: str) -> int:
    return main(["export", str(run / "pretrain/ck"), str(output), "--dense", str(run / "dense"), *words])


@pytest.mark.parametrize(
    ("receipt", "said"),
    [
        ([1], "got no receipt"),
        ("text", "got no receipt"),
        ({"spec": [1]}, "got no receipt"),
        ({"spec": {"num_experts": 4, "new_field": 1}}, "unexpected keyword argument 'new_field'"),
        ({"spec": {"num_experts": 4, "noise_std": "much"}}, "noise_std: got much"),
        ({"spec": {"num_experts": "4"}}, "num_experts: got 4, expected a whole number"),
    ],
)
def test_a_receipt_that_is_none_is_told_in_one_message(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], receipt: Any, said: str
) -> None:
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    assert _export(run, tmp_path / "hf", "--receipt", str(tmp_path / "receipt.json")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"]


def test_a_stages_folder_is_not_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline marks its stages' folders, too."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / MARKER).write_text('{"stage": "evaluate"}')
    assert _export(run, tmp_path / "stage", *SAID) == 2
    assert "a finished folder that was not made by nemo-upcycle export" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [MARKER]
    for _ in range(2):  # an earlier export is replaced
        assert _export(run, tmp_path / "hf", *SAID) == 0


def test_what_no_tensor_shows_must_be_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without context, arguments and receipt: a router of the other order would be off without a word."""
    assert _export(run, tmp_path / "hf", "--experts", "4") == 2
    error = capsys.readouterr().err
    assert "got neither a context/, arguments in common.pt nor a receipt" in error
    assert "add --top-k and --router-order, or --receipt FILE" in error
    assert not (tmp_path / "hf").exists()
    assert _export(run, tmp_path / "hf", *SAID[:-1], "softmax_topk") == 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["norm_topk_prob"] is False


def _receipt(folder: Path, **changes: Any) -> str:
    spec = {"num_experts": 4, "top_k": 2} | changes
    (folder / "receipt.json").write_text(json.dumps({"spec": spec}))
    return str(folder / "receipt.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--top-k", "4"), "--top-k: got 4, expected 2 (spec.top_k in "),
        (("--router-order", "softmax_topk"), "--router-order: got softmax_topk, expected topk_softmax (spec."),
        (("--experts", "8"), "--experts: got 8, expected 4 (spec.num_experts in "),
        (("--seed", "7"), "--seed: got 7, expected 1234 (spec.seed in "),
    ],
)
def test_an_option_that_contradicts_the_receipt_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str], said: str
) -> None:
    receipt = _receipt(tmp_path)
    assert _export(run, tmp_path / "hf", "--receipt", receipt, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert f"omit {words[0]}" in error
    assert not (tmp_path / "hf").exists()
    assert _export(run, tmp_path / "hf", "--receipt", receipt, "--top-k", "2") == 0


def test_options_and_receipt_must_agree_with_the_context(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    arguments = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "swiglu": True}
    arguments |= {"group_query_attention": True, "num_query_groups": 2, "rotary_base": 100000, "norm_epsilon": 1e-5}
    arguments |= {"untie_embeddings_and_output_weights": True, "num_experts": 4, "moe_router_topk": 3}
    torch.save({"args": argparse.Namespace(**arguments)}, copy / "pretrain/ck/weights/common.pt")
    said = "error: {}: got 2, expected 3 (moe_router_topk in "
    (tmp_path / "other").mkdir()
    for field, words in (("--top-k", ("--top-k", "2")), ("top_k", ("--receipt", _receipt(tmp_path / "other")))):
        assert _export(copy, tmp_path / "hf", *words) == 2
        assert said.format(field) in capsys.readouterr().err
    assert _export(copy, tmp_path / "hf", "--experts", "4") == 0  # an option less is no other value
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_experts_per_tok"] == 3


def test_rounding_is_named_in_text_json_and_marker(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = r"float32 weights are rounded to bfloat16 (model.embed_tokens.weight and "
    assert _export(run, tmp_path / "hf", *SAID) == 0
    assert words in capsys.readouterr().out
    assert _export(run, tmp_path / "hf", *SAID, "--json") == 0
    (rounded,) = json.loads(capsys.readouterr().out)["rounded"]
    assert rounded.startswith(words)
    assert json.loads((tmp_path / "hf" / MODEL_MARKER).read_text())["rounded"] == [rounded]
    assert _export(run, tmp_path / "hf", *SAID, "--dtype", "float32") == 0
    assert "rounded" not in capsys.readouterr().out


@pytest.fixture
def runs(run: Path, tmp_path: Path) -> Path:
    """A run of the pipeline with checkpoints of steps 9 and 10, an older one, and one that was not finished."""
    folder = tmp_path / "runs/mine"
    for stage in ("pretrain", "dense_ct"):
        for name in ("x--step=9", "x--step=10-last", "x--step=11", "x--step=12-last"):
            shutil.copytree(run / "pretrain/ck", folder / stage / "checkpoints" / name)
            torch.save({}, folder / stage / "checkpoints" / name / "weights/common.pt")
        (folder / stage / "checkpoints/x--step=11/weights/common.pt").unlink()
        (folder / stage / "checkpoints/x--step=12-last-unfinished").touch()
    return folder


@pytest.mark.parametrize("where", ["", "pretrain", "pretrain/checkpoints", "pretrain/checkpoints/last", ".."])
def test_the_newest_complete_checkpoint_of_a_run_is_found(
    run: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    if where == "..":
        shutil.rmtree(runs / "dense_ct")
    words = ["export", str(runs / where), str(tmp_path / "hf"), "--dense", str(run / "dense"), *SAID]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "from " in out
    assert "pretrain/checkpoints/x--step=10-last\n" in out


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nothing", "runs/mine/nothing: got no such folder"),
        ("pretrain/checkpoints/x--step=12-last", "being written or removed (x--step=12-last-unfinished)"),
        ("pretrain/checkpoints/lost", "got no such folder"),
        ("logs", "got no complete checkpoint (a.log)"),
        ("empty/last", "got no complete checkpoint (an empty folder)"),
        ("..", "got several (mine/dense_ct/checkpoints/x--step=10-last, mine/pretrain/checkpoints/x--step=10-last)"),
    ],
)
def test_what_is_no_checkpoint_is_told_with_what_is_there(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, said: str
) -> None:
    for folder in ("logs", "empty"):
        (runs / folder).mkdir()
    (runs / "logs/a.log").touch()
    assert main(["export", str(runs / where), str(tmp_path / "hf")]) == 2
    assert said in capsys.readouterr().err
