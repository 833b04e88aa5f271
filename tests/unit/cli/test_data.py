"""`nemo-upcycle data` as it is typed: overrides stand anywhere, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    (tmp_path / "one.txt").write_text("text")
    (tmp_path / "mine.yaml").write_text("sources: {mine: {train: ['one.txt']}}\n")
    return ["data", str(tmp_path / "mine.yaml"), str(tmp_path / "made")]


@pytest.mark.parametrize("place", [3, 4, 5])
def test_overrides_stand_before_and_after_options(
    typed: list[str], place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*typed, "--check", "--strict"]
    assert main([*words[:place], "seq_length=1", *words[place:]]) == 2
    assert "seq_length: got 1, expected 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check", "seqlength"], "argument 'seqlength': got no =, expected KEY=VALUE. Fix: type"),
        (["--check", "seqlength=2"], "key 'seqlength' does not exist. Did you mean 'seq_length'?"),
        (["seed=1", "--chekc", "seed=2"], "--chekc"),
        (["--qos", "high", "seed=2"], "--qos: got no --slurm"),
        (["--slurm", "cpu", "--qos", "seed=2"], "--qos: got seed=2, expected no KEY=VALUE"),
        (["--check", "--", "seq_length=1"], "seq_length: got 1"),
    ],
)
def test_mistakes_are_named(typed: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*typed, *words]) == 2
    assert said in capsys.readouterr().err
