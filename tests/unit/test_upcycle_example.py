"""`examples/upcycle.py` as a user runs it: the same bytes as `nemo-upcycle convert`, and clean errors."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import upcycle

from nemo_upcycle import UpcycleSpec
from tests.folders import change_config, change_weights, converted
from tests.models import LLAMA3_SCALING, hugging_face_logits, weights_of, write_llama, write_qwen2, write_qwen3
from tests.tiers import every_pair


SCRIPT = Path(upcycle.__file__)
SIZES = {1: ("4", "2"), 2: ("8", "4")}
OPTIONS = ["--experts", "4", "--top-k", "2"]
TOKENIZER = {"merges.txt": "#version: 0.2", "special_tokens_map.json": "{}", "LICENSE": "free"}
LEFT = {"modeling_own.py": "raise SystemExit", "pytorch_model.bin": "old"}


def _type(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["upcycle.py", *map(str, words)])
    upcycle.main()


def _dtype(folder: Path, dtype: torch.dtype) -> Path:
    """Cast a folder's weights, which may lie in several files."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("write", "granularity", "tied", "dtype", "shards"),
    every_pair([write_llama, write_qwen3], [1, 2], [False, True], [torch.float32, torch.bfloat16], [1, 3]),
)
def test_writes_the_bytes_of_convert(
    write: Callable[..., Path],
    granularity: int,
    tied: bool,
    dtype: torch.dtype,
    shards: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = _dtype(write(tmp_path / "parent", tied=tied, layers=2, shards=shards), dtype)
    assert len([*parent.glob("*.safetensors")]) >= shards
    for name, text in {**TOKENIZER, **LEFT}.items():
        (parent / name).write_text(text)
    experts, top_k = SIZES[granularity]
    most_bytes = 10**9 if shards == 1 else 100_000
    monkeypatch.setattr(upcycle, "FILE_BYTES", most_bytes)
    numbers = ("--experts", experts, "--top-k", top_k, "--granularity", granularity, "--seed", 7)
    _type(monkeypatch, parent, tmp_path / "moe", *numbers)
    spec = UpcycleSpec(num_experts=int(experts), top_k=int(top_k), granularity=granularity, seed=7)
    converted(parent, tmp_path / "wanted", spec, max_shard_bytes=most_bytes)

    made, wanted = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("moe", "wanted"))
    assert wanted.keys() - made.keys() == {"README.md", "nemo_upcycle.json"}
    assert made.keys() <= wanted.keys()
    for name, path in made.items():
        if name.endswith(".json"):
            assert json.loads(path.read_text()) == json.loads(wanted[name].read_text()), name
        else:
            assert path.read_bytes() == wanted[name].read_bytes(), name
    assert made.keys() >= TOKENIZER.keys()
    assert {tensor.dtype for tensor in weights_of(tmp_path / "moe").values()} == {dtype}


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("write", [write_llama, write_qwen3])
def test_computes_the_parents_logits(
    write: Callable[..., Path], granularity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = write(tmp_path / "parent", tied=True, layers=2, rope_scaling=LLAMA3_SCALING)
    experts, top_k = SIZES[granularity]
    numbers = ("--experts", experts, "--top-k", top_k, "--granularity", granularity)
    _type(monkeypatch, parent, tmp_path / "moe", *numbers)
    tokens_BS = torch.randint(250, (2, 33), generator=torch.Generator().manual_seed(0))
    wanted_BSV = hugging_face_logits(parent, tokens_BS)
    logits_BSV = hugging_face_logits(tmp_path / "moe", tokens_BS, strict=True)
    torch.testing.assert_close(logits_BSV, wanted_BSV, rtol=0, atol=1e-5 * float(wanted_BSV.abs().max()))


@pytest.fixture
def parent(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "parent"))


def _refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the last line of a run that fails with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        _type(monkeypatch, *words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--experts", "1", "--top-k", "1"], "--experts is 1; expected 2 to 2048."),
        (["--experts", "4", "--top-k", "1"], "--top-k is 1; expected 2 to --experts, which is 4."),
        (["--experts", "4", "--top-k", "5"], "--top-k is 5; expected 2 to --experts, which is 4."),
        ([*OPTIONS, "--granularity", "0"], "--granularity is 0; expected a divisor of --experts, which is 4."),
        ([*OPTIONS, "--granularity", "4"], "--top-k is 2; expected a multiple of --granularity, which is 4."),
        (["--experts", "10", "--top-k", "5", "--granularity", "5"], "expected a divisor of intermediate_size, 96."),
        ([*OPTIONS, "--seed", "-1"], "--seed is -1; expected 0 or more."),
        (["--experts", "many", "--top-k", "2"], "argument --experts: invalid int value: 'many'"),
    ],
)
def test_refuses_a_wrong_number(
    words: list[str], text: str, parent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in _refused(monkeypatch, capsys, parent, parent.with_name("moe"), *words)
    assert [path.name for path in parent.parent.iterdir()] == ["parent"]


def test_refuses_a_wrong_folder(
    parent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = parent.with_name("moe")
    for folder, text in (
        (parent / "nowhere", f"No folder {parent / 'nowhere'}."),
        (parent.parent, f"{parent.parent / 'config.json'}"),
        (write_qwen2(parent.with_name("qwen2"), layers=1), "['Qwen2ForCausalLM']; expected LlamaForCausalLM or Qwen3"),
    ):
        assert text in _refused(monkeypatch, capsys, folder, out, *OPTIONS)
    assert not out.exists()
    assert f"{parent} exists." in _refused(monkeypatch, capsys, parent, parent, *OPTIONS)


def test_refuses_settings_that_the_weights_contradict(
    parent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = parent.with_name("moe")
    for changes, text in (
        ({"attention_bias": True}, "attention_bias is True"),
        ({"vocab_size": 260}, "model.embed_tokens.weight: shape (250, 64) in the files, (260, 64) by config.json."),
        (
            {"vocab_size": 250, "num_hidden_layers": 3},
            "model.layers.2.input_layernorm.weight: shape None in the files",
        ),
        ({"num_hidden_layers": 2, "partial_rotary_factor": 0.5}, "Rotary embedding is default on 0.5 of each head"),
        ({"partial_rotary_factor": 1, "tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight"),
    ):
        change_config(parent, **{"attention_bias": False, **changes})
        assert text in _refused(monkeypatch, capsys, parent, out, *OPTIONS)
    assert not out.exists()


def test_leaves_nothing_of_a_run_that_fails(
    parent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(parent, {"model.norm.weight": torch.full((64,), torch.nan)})
    text = _refused(monkeypatch, capsys, parent, parent.with_name("moe"), *OPTIONS)
    assert "model.norm.weight holds NaN" in text
    assert [path.name for path in parent.parent.iterdir()] == ["parent"]
    (parent / "model.safetensors").write_bytes(b"cut off")
    assert "model.safetensors" in _refused(monkeypatch, capsys, parent, parent.with_name("moe"), *OPTIONS)


def test_is_one_short_file_of_torch_and_safetensors() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for node in imports for name in _imported(node)}
    assert names - sys.stdlib_module_names == {"torch", "safetensors"}


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
