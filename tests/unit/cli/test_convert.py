"""`convert` states whether the result is exact, and reports an error if the system cannot write the result."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.cli.common import file_size
from nemo_upcycle.cli.main import main
from nemo_upcycle.errors import UpcycleError
from tests.models import write_llama, write_tokenizer
from tests.parents import write_wrapped
from tests.unit.cli.conftest import Command


SPEC = ("--experts", "2", "--top-k", "2")
FINE = ("--experts", "8", "--top-k", "4", "--granularity", "2")


@pytest.mark.parametrize(
    ("more", "said", "facts"),
    [
        (SPEC, "Computes the parent's function", {"exact": True, "needs_float32_routing": False, "files_kept": 0}),
        (FINE, "needs router logits in float32: in 16 bits", {"exact": True, "needs_float32_routing": True}),
        (("--branch", "DENSE", "--non-expert-weights", "mean"), "experts come from 2 dense models", {"exact": False}),
    ],
)
def test_it_is_told_how_exact_the_result_is(
    dense: Path, tmp_path: Path, command: Command, more: tuple[str, ...], said: str, facts: dict[str, object]
) -> None:
    typed = ["convert", str(dense), str(tmp_path / "moe"), *(word.replace("DENSE", str(dense)) for word in more)]
    assert command.values(*typed).items() >= facts.items()
    assert said in command.text(*typed)


@pytest.mark.parametrize(
    ("more", "said", "alone"),
    [
        ((), ": Qwen3VLMoeForConditionalGeneration, 0.000", False),
        (("--text-only",), "without visual (39 tensors, 412160 bytes)", True),
        (("--router-order", "softmax_topk"), "ForConditionalGeneration has no place for expert weights that do", True),
    ],
)
def test_writes_a_vision_parent_whole_or_says_why_not(
    tmp_path: Path, command: Command, more: tuple[str, ...], said: str, alone: bool
) -> None:
    folder = write_wrapped(tmp_path / "dense", "Qwen3VL")
    typed = ["convert", str(folder), str(tmp_path / "moe"), "--experts", "6", "--top-k", "3", *more]
    text, found = command.text(*typed), command.values(*typed)
    assert said in text
    assert ("only the text model, without visual" in text, bool(found["left_out"])) == (alone, alone)
    assert (found["hf_class"] == "Qwen3MoeForCausalLM", bool(found["unseen_because"])) == (alone, more[1:] != ())


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("file/moe", "Not a directory. Check the path: a part of it is a file"),
        ("loop/moe", "has links that form a loop. Choose"),
        ("x" * 300, "File name too long. Choose a shorter name"),
    ],
)
def test_where_nothing_can_be_written_says_what_to_do(
    dense: Path, tmp_path: Path, output: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main(["convert", str(dense), str(tmp_path / output), *SPEC]) == 2
    assert words in capsys.readouterr().err


def _command(dense: Path, output: Path) -> str:
    return shlex.join([sys.executable, "-m", "nemo_upcycle.cli", "convert", str(dense), str(output), *SPEC])


@pytest.mark.full
def test_a_closed_output_or_a_poor_terminal_stops_nothing(dense: Path, tmp_path: Path) -> None:
    command = _command(dense, tmp_path / "m\u00f6e")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(f"{command} 2>&-", shell=True, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "m\u00f6e/config.json").is_file()


@pytest.mark.slow
@pytest.mark.full
def test_a_file_larger_than_the_system_takes(dense: Path, tmp_path: Path) -> None:
    command = f"ulimit -f 100; {_command(dense, tmp_path / 'moe')}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False, text=True)
    assert done.returncode == 2
    assert "see `ulimit -f`, or lower --max-shard-size" in done.stderr
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "1e3GB", "9999999GB"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    assert file_size("60 KB") == 60_000
    with pytest.raises(UpcycleError, match=f"Size of a file is '{size}'"):
        file_size(size)


def test_tied_embeddings_count_once_as_on_the_card(tmp_path: Path, command: Command) -> None:
    parent = write_tokenizer(write_llama(tmp_path / "dense", vocab_size=259, tie_word_embeddings=True))
    made = command.values("convert", str(parent), str(tmp_path / "moe"), *SPEC)
    assert f"{made['total_params']:,} parameters" in (tmp_path / "moe/README.md").read_text(encoding="utf-8")


def test_kept_files_are_told_with_a_check(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(dense), str(tmp_path / "moe"), *SPEC]
    assert main(command) == 0
    with (tmp_path / "moe/model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff")
    capsys.readouterr()
    assert main([*command, "--no-proof"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "kept from before" in line]
    told, verify, _ = line.split("`")
    assert told == "1 of 1 files kept from before, with the right size and header; to check their content: "
    assert main(shlex.split(verify)[1:]) == 1


def test_a_damaged_kept_file_is_found_by_running_it(dense: Path, tmp_path: Path, command: Command) -> None:
    typed = ["convert", str(dense), str(tmp_path / "moe"), *SPEC]
    assert command.values(*typed, "--no-proof")["proof"] is None
    with (tmp_path / "moe/model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff")
    assert command.values(*typed, status=1)["proof"]["outcome"] == "different"
    assert "Does not compute the parent's function: in transformers" in command.text(*typed, status=1)


def test_nothing_is_called_exact_before_it_ran(dense: Path, tmp_path: Path, command: Command) -> None:
    text = command.text("convert", str(dense), str(tmp_path / "moe"), *SPEC, "--no-proof")
    assert "Not run. It should compute the parent's function" in text
    assert "## Checked" not in (tmp_path / "moe/README.md").read_text(encoding="utf-8")
