"""The command line: light, with errors that say what to do, and the same answers as the library."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.cli.main import COMMANDS, main
from tests.models import write_llama, write_tokenizer


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=2))


def _fails(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    assert f"nemo-upcycle {name}" in capsys.readouterr().out.partition("example")[2]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in (["--help"], ["-h"], ["help"], ["plan", "--help"], ["help", "plan"]):
        with pytest.raises(SystemExit) as done:
            main(words)
        assert done.value.code == 0
        texts.append(capsys.readouterr().out)
    assert all(f"\n    {name}" in texts[0] for name in COMMANDS)
    assert texts[0] == texts[1] == texts[2]
    assert texts[3] == texts[4]
    assert main([]) == 2
    assert "usage: nemo-upcycle" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_usage_error_is_one_line_with_an_example_that_parses(capsys: pytest.CaptureFixture[str], name: str) -> None:
    error = _fails(capsys, name, "one", "two", "three", "four")
    assert len(error.splitlines()) == 1
    example = error.partition("`")[2].partition("`")[0].split()
    assert example[:2] == ["nemo-upcycle", name]
    parser = argparse.ArgumentParser()
    importlib.import_module(f"nemo_upcycle.cli.{name}").add_arguments(parser)
    parser.parse_args(example[2:])


def test_it_starts_without_torch_and_nemo() -> None:
    """What makes a start slow is never imported for a help text."""
    code = (
        "import sys\nfrom nemo_upcycle.cli.main import main\n"
        "for name in ('data', 'fetch', 'convert', 'verify', 'export', 'report', 'doctor'):\n"
        "    try: main([name, '--help'])\n    except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'nemo', 'nemo_run', 'lightning', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convrt"], "command 'convrt' does not exist. Did you mean 'convert'?"),
        (["help", "convrt"], "command 'convrt' does not exist. Did you mean 'convert'?"),
        (["hlep"], "Did you mean 'help'?"),
        (["convert", "a", "b", "--expert", "8"], "option '--expert' does not exist. Did you mean '--experts'?"),
        (["plan", "--price", "2"], "option '--price' does not exist. Did you mean '--price-per-gpu-hour'?"),
        (["verify", "a", "b", "--experts", "8"], "option '--experts' does not exist. Fix: see"),
        (["convert", "a", "b", "--topk=2"], "option '--topk' does not exist. Did you mean '--top-k'?"),
        (["data", "sotuu", "d"], "blend 'sotuu' does not exist. Did you mean 'sotu'?"),
        (["data", "sotu", "d", "--workers", "0"], "--workers: got 0, expected 1 or more"),
        (
            ["data", "sotu", "d", "--slurm", "cpu", "--ray"],
            "way to run: got --slurm and --ray, expected one of them",
        ),
        (["data", "sotu", "d", "--time", "1:00:00"], "--time: got no --slurm, expected both"),
        (["data", "sotu", "d"], "tokenizer: got none, expected the dense model whose tokenizer is used"),
        (["convert", "a"], "the following arguments are required: DST"),
        (["convert", "a", "b", "--experts", "many"], "--experts: got 'many', expected a whole number. Fix: type"),
        (["convert", "a", "b", "--router-std", "wide"], "--router-std: got 'wide', expected a number. Fix: type"),
        (["convert", "a", "b", "--seed", "-1"], "Fix: set --seed within the range"),
        (["convert", "assets://smollm2-135m", "b"], "address scheme 'assets' does not exist. Did you mean 'asset'?"),
        (["verify", "nemo:///a", "b"], "nemo:///a: got a NeMo or Megatron checkpoint, expected a Hugging Face folder"),
        (["verify", "s3://b/c", "a"], "address scheme 's3' does not exist. Valid: asset, hf, nemo."),
        (["verify", "a", "b", "--weights-only", "--layers"], "--weights-only: got --layers beside it"),
        (["verify", "a", "b", "--weights-only", "--text", "t"], "--weights-only: got --text beside it"),
        (["export", "a", ""], "folder to make: got an empty name"),
        (["convert", "", "b"], "model: got an empty name, expected a folder or hf://ORG/NAME"),
        (["convert", "a", "b", "--method", "copi"], "method 'copi' does not exist. Did you mean 'copy'?"),
        (["convert", "a", "b", "--dtype", "bfloat"], "dtype 'bfloat' does not exist. Did you mean 'bfloat16'?"),
        (["convert", "a", "b", "--top-k", "9"], "error: --top-k: got 9, expected a whole number, 1 to 8"),
        (["convert", "a", "b", "--experts", "0"], "error: --experts: got 0"),
        (
            ["convert", "a", "b", "--granularity", "3"],
            "error: --experts: got 8, expected a multiple of --granularity (3), the experts of each copy of the"
            " network. Fix: set --experts=9.",
        ),
        (
            ["convert", "a", "b", "--top-k", "1"],
            "Fix: set --top-k=2, or of a dense parent --router-order=softmax_topk (exact with --router-init=zero)",
        ),
        (["convert", "/absent", "b"], "model '/absent': got no such folder"),
        (["convert", "a", "b", "--non-expert-weights", "men"], "'men' does not exist. Did you mean 'mean'?"),
        (["convert", "a", "b", "--noise-std", "0.5"], "--noise-std: got 0.5, expected it with --method noise only"),
        (["convert", "a", "b", "--method", "noise", "--drop-ratio", "0"], "--drop-ratio: got 0.0, expected it with"),
        (["convert", "a", "b", "--moe-layers", "1" * 5000], "error: --moe-layers '1111"),
        (["verify", "a", "b", "--tolerance", "nan"], "tolerance: got nan, expected a number, 0 or more"),
        (["verify", "/absent", "/absent"], "model '/absent': got no such folder"),
        (["export", "/absent", "b"], "/absent: got no such folder, expected a checkpoint"),
        (["report", "/absent"], "/absent: got no such folder, expected that of a pipeline run. Fix: check the path."),
    ],
)
def test_mistakes_are_named_with_the_fix(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = _fails(capsys, *words)
    assert error.startswith("error: ")
    assert said in error
    assert not list(tmp_path.iterdir())


def test_convert_and_verify_from_end_to_end(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(dense), str(tmp_path / "moe"), "--experts", "4", "--top-k", "2", "--json"]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["hf_class"], made["exact"], made["files_kept"]) == ("MixtralForCausalLM", True, 0)
    assert main(command[:-1]) == 0
    assert "computes the parent's function" in capsys.readouterr().out
    verify = ["verify", str(dense), str(tmp_path / "moe")]
    assert main([*verify, "--layers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is found["weights_exact"] is True
    assert found["logits"]["relative"] < 1e-6
    assert main(verify) == 0
    assert "equal: yes" in capsys.readouterr().out
    assert main(["convert", str(dense), str(tmp_path / "noisy"), "--method", "noise"]) == 0
    assert "not exact: noise_std=0.01 changes every weight" in capsys.readouterr().out
    assert main(["verify", str(dense), str(tmp_path / "noisy")]) == 1
    assert "equal: no" in capsys.readouterr().out


def test_several_parents_become_experts(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    branch = write_tokenizer(write_llama(tmp_path / "branch", vocab_size=259, layers=2))
    options = ["--branch", str(branch), "--non-expert-weights", "mean"]
    assert main(["convert", str(dense), str(tmp_path / "moe"), *options]) == 0
    assert "experts come from 2 dense models" in capsys.readouterr().out


def _command(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command as a process, its output read by this one."""
    command = [str(Path(sys.executable).parent / "nemo-upcycle"), *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=ROOT, text=True, **streams)


@pytest.mark.slow
def test_a_reader_that_goes_does_not_fail_the_work(dense: Path, tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    for words in (
        ("convert", str(dense), str(tmp_path / "moe")),
        ("plan", "--recipe", "llama3_8b_e8t2", "--gpus", "64"),
    ):
        with _command(*words, stdout=writes) as process:
            error = process.communicate()[1]
        assert process.returncode == 0, error
        assert "rror" not in error
    os.close(writes)
    assert main(["verify", str(dense), str(tmp_path / "moe"), "--weights-only"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_without_room_is_told_and_fails_where_the_answer_is_all(dense: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    for words, status in (
        (("convert", str(dense), str(moe)), 0),
        (("plan", "--recipe", "llama3_8b_e8t2", "--gpus", "64"), 2),
    ):
        with open("/dev/full", "w") as full, _command(*words, stdout=full) as process:
            error = process.communicate()[1]
        assert process.returncode == status
        assert error.startswith("error: standard output: got No space left on device")
        assert (f"{moe} is whole" in error) is (status == 0)
    assert main(["verify", str(dense), str(moe), "--weights-only"]) == 0


@pytest.mark.parametrize(("sent", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_with_a_word(tmp_path: Path, sent: str, status: int) -> None:
    code = (
        "import os, signal, sys\n"
        "from nemo_upcycle.cli import convert, main\n"
        f"convert.run = lambda args: (os.kill(os.getpid(), signal.{sent}), signal.pause())\n"
        "sys.exit(main.main(['convert', 'a', 'b']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (status, "stopped; run again to resume")


def test_ctrl_c_as_the_command_starts_prints_no_traceback(tmp_path: Path) -> None:
    """Where Python has read the command's name and imports the package: before that it is Python's own to say."""
    (tmp_path / "typing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = (
        "import signal, sys; sys.argv = ['/usr/bin/nemo-upcycle', 'doctor']; sys.modules.pop('typing', None)\n"
        f"sys.path.insert(0, {str(tmp_path)!r}); import nemo_upcycle\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_interrupted_it_says_how_to_go_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    assert "run again to resume" in _fails(capsys, "convert", str(dense), str(tmp_path / "moe"), status=130)


def _save(folder: str, output: str) -> None:
    from megatron.core import dist_checkpointing

    from tests.models import build_chunks

    (chunk,) = build_chunks(Path(folder), num_experts=4)
    with open_dense(folder) as source:
        receipt = upcycle_into([chunk], source, UpcycleSpec(num_experts=4, top_k=2))
    weights = Path(output) / "pretrain/checkpoints/last/weights"
    weights.mkdir(parents=True)
    dist_checkpointing.save(chunk.sharded_state_dict(prefix="module."), str(weights))
    receipt.write(Path(output) / "receipt.json")


def test_export_finds_the_spec_in_the_runs_receipt(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.distributed.ranks import run_ranks

    run_ranks(_save, 1, str(dense), str(tmp_path))
    checkpoint = str(tmp_path / "pretrain/checkpoints/last")
    assert main(["export", checkpoint, str(tmp_path / "hf"), "--dtype", "float32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hf_class"] == "MixtralForCausalLM"
    assert main(["verify", str(dense), str(tmp_path / "hf"), "--weights-only"]) == 0
    assert main(["export", checkpoint, str(tmp_path / "y"), "--noise-std", "0.01"]) == 0  # the receipt's own
    capsys.readouterr()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "links that form a loop" in _fails(capsys, "export", checkpoint, str(tmp_path / "loop/hf"))
    assert "got the same folder" in _fails(capsys, "export", checkpoint, str(dense))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine", encoding="utf-8")
    assert "files that are not ours" in _fails(capsys, "export", checkpoint, str(other))
