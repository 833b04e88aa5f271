"""`calibrate`, then `convert` with its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main
from tests.models import write_llama, write_tokenizer


SPEC = ("--experts", "4", "--top-k", "4", "--granularity", "2", "--router-init", "prompts")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=2))


def test_what_is_calibrated_is_converted(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, texts = str(tmp_path / "file"), tmp_path / "texts.yaml"
    texts.write_text("- [how to bake, flour and eggs]\n- the court rules\n")
    command = ["calibrate", str(dense), file, *SPEC, "--router-prompts", str(texts)]
    assert main([*command, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["made"], done["layers"]) == (True, 2)
    assert main(command) == 0
    assert "made before, from the same inputs" in capsys.readouterr().out
    assert main(["convert", str(dense), str(tmp_path / "moe"), *SPEC, "--calibration", file]) == 0
    assert "computes the parent's function" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["calibrate", "DENSE", "FILE", "--experts", "4"],
            "--router-init: got normal, expected --router-init=prompts",
        ),
        (
            ["calibrate", "DENSE", "FILE", *SPEC[:-1], "kmeans"],
            "--router-init: got kmeans, expected another: this",
        ),
        (
            ["convert", "DENSE", "FILE", *SPEC, "--router-prompts", "x"],
            "--calibration: got none, expected the file that --router-init=prompts",
        ),
        (["convert", "DENSE", "FILE", *SPEC, "--calibration", "none"], "calibration file none: got no such file"),
        (["convert", "DENSE", "FILE", "--calibration", "none"], "--calibration: got none, expected none: nothing is"),
        (["calibrate", "DENSE", "FILE", "--router-init", "prompts"], "--router-prompts: got none, expected a file"),
    ],
)
def test_mistakes_are_told_by_the_options_names(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    places = {"DENSE": str(dense), "FILE": str(tmp_path / "file")}
    assert main([places.get(word, word) for word in words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "file").exists()
