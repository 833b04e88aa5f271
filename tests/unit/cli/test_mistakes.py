"""A mistake is named as it was typed, and nothing is written. Mistakes of `plan` are in test_plan.py."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main
from tests.unit.cli.conftest import refused, write_config


CALIBRATE = "calibrate a b --experts 4 --top-k 4 --granularity 2"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("convrt", "command 'convrt' does not exist"),
        ("data sotu d", "The tokenizer is missing"),
        ("data file d tokenizer=mine", "File file has no supported text format"),
        ("start a b --gpus 3.5", "--gpus is '3.5'; expected"),
        ("data sotu d --workers 0", "--workers is 0; expected"),
        ("data sotu d --slurm cpu --ray", "--slurm cannot be combined with --ray"),
        ("data sotu d --time 1:00:00", "--time needs --slurm"),
        ("data sotu d --slurm cpu --time seed=2", "--time has no value before seed=2"),
        (CALIBRATE, "--router-init is normal, and a calibration is used only with --router-init=prompts"),
        (f"{CALIBRATE} --router-init prompts", "--router-prompts is missing"),
        ("convert a b --calibration none", "--calibration is read only with --router-init=prompts"),
        ("convert '' b", "SRC is empty"),
        ("start mine '' --gpus 0", "TEXTS is empty"),
        ("start mine --gpus 0 --gpu=", "--gpu is empty"),
        ("evaluate . demo c --limit -1", "--limit is -1; expected"),
        ("evaluate . demo c --tp 0", "--tp is 0; expected"),
        ("evaluate . demo c --name ../../evil", "--name is '../../evil'; expected"),
        ("evaluate . demo c --tp 3", "--tp 3 applies to Megatron checkpoints; . is a Hugging Face folder"),
        ("data / d tokenizer=mine", "Folder / is the root of this machine"),
        ("start a b --gpus 1000000000", "--gpus is 1000000000; expected"),
        ("start a b --steps 3 --epochs 2", "--epochs cannot be combined with --steps"),
        ("convert a b --noise-std 0.1", "--noise-std is ignored unless --method is noise"),
        (
            "convert a b --router-init zero --router-std 0.1",
            "--router-std is ignored unless --router-init is normal",
        ),
        ("convert acme/tiny b", "No model folder acme/tiny"),  # acme is a folder here, so acme/tiny is not a hub name
        ("convert asset://smollm2-135m b", "Cache file/dense cannot be written: Not a directory"),
        ("convert a b --method copi", "--method 'copi' does not exist"),
        ("verify nemo:///a b", "nemo:///a is a NeMo or Megatron checkpoint"),
        ("verify a b --weights-only --layers", "--weights-only cannot be combined with --layers"),
        ("export a ''", "DST is empty"),
        ("report /absent", "No run folder /absent"),
    ],
)
def test_a_mistake_is_named_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    write_config(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "acme").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", "file")
    assert str(refused(*shlex.split(typed))).startswith(said)
    assert {path.name for path in tmp_path.iterdir()} == {"acme", "config.json", "file"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("convert a b --expert 8", "option '--expert' does not exist. Did you mean '--experts'?"),
        ("verify a b --experts 8", "option '--experts' does not exist. See"),
        ("convert a", "the following arguments are required: DST"),
        (
            "convert a b --router-std wide",
            "--router-std is 'wide'; expected a number. Write, for example, --router",
        ),
        ("plan --recipe a --model b --gpus 8", "not allowed with argument"),
        ("data sotu d --check seqlength", "argument 'seqlength' is not KEY=VALUE. Type"),
    ],
)
def test_what_is_not_parsed_is_a_line_with_the_fix(capsys: pytest.CaptureFixture[str], typed: str, said: str) -> None:
    assert main(typed.split()) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("error: ")
    assert said in err


@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", "8"), ("RANK", "3"), ("WORLD_SIZE", "many")])
def test_ranks_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    error = refused("evaluate", "a", "demo", "c")
    assert (error.subject, error.fix.partition(" first")[0]) == (f"{variable}={value}", f"type `unset {variable}`")
