"""`calibrate`, then `convert` and `verify` with its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main
from tests.blends import write_blend
from tests.models import write_llama, write_tokenizer


SPEC = ("--experts", "4", "--top-k", "4", "--granularity", "2", "--router-init", "kmeans")
SPLIT = (*SPEC, "--expert-split", "coactivation")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=2))


def test_what_is_calibrated_is_converted_and_verified(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blend, file, moe = write_blend(tmp_path / "blend", dense), str(tmp_path / "file"), str(tmp_path / "moe")
    command = ["calibrate", str(dense), file, "--data", str(blend), "--tokens", "1024", *SPLIT]
    assert main([*command, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["made"], done["tokens"], done["layers"]) == (True, 1024, 2)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "2 layers, 1024 tokens" in out
    assert "made before, from the same inputs" in out
    assert "co-activated pairs in one part" in out
    assert main(["convert", str(dense), moe, *SPLIT, "--calibration", file]) == 0
    assert "computes the parent's function" in capsys.readouterr().out
    assert main(["verify", str(dense), moe, "--weights-only", "--calibration", file]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["calibrate", "DENSE", "FILE", *SPEC], "--data: got none, expected the text to run the dense model on"),
        (["calibrate", "DENSE", "FILE", "--experts", "4"], "--router-init: got normal, expected --router-init=kmeans"),
        (["convert", "DENSE", "FILE", *SPEC], "--calibration: got none, expected the file that --router-init=kmeans"),
        (["convert", "DENSE", "FILE", *SPEC, "--calibration", "none"], "calibration file none: got no such file"),
        (["convert", "DENSE", "FILE", "--calibration", "none"], "--calibration: got none, expected none: nothing is"),
        (["calibrate", "DENSE", "FILE", "--router-init", "prompts"], "--router-prompts: got none, expected a file"),
        (["convert", "DENSE", "FILE", "--expert-split", "coactivation"], "--granularity: got 1, expected 2 or more"),
    ],
)
def test_mistakes_are_told_by_the_options_names(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    places = {"DENSE": str(dense), "FILE": str(tmp_path / "file")}
    assert main([places.get(word, word) for word in words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "file").exists()
