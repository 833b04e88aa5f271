"""Every printed command can be typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_upcycle.utils.command_line import CommandLine, own_program, shown_program


PIPELINE = ("upcycle", "pipeline", "--factory", "my_recipes.chain(num_gpus=2)", "dir=runs/a", "--yes")


@pytest.fixture(autouse=True)
def _shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a recipe, with no program of this environment on PATH."""
    (tmp_path / "my recipes").mkdir()
    (tmp_path / "my recipes/my_recipes.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", "my recipes")
    monkeypatch.setattr("sys.argv", [str(own_program("nemo")), *PIPELINE])


def test_a_module_found_by_pythonpath_is_found_again(tmp_path: Path) -> None:
    typed = CommandLine.typed().anywhere()
    assert str(typed).startswith(f"cd {tmp_path} && PYTHONPATH='my recipes' {own_program('nemo')} upcycle ")
    assert CommandLine.read(f"{typed}\n") == typed


def test_a_python_path_that_holds_no_recipe_is_omitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert CommandLine.typed().python_path == ""


def test_a_script_is_typed_with_its_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "chain.py"
    script.touch(mode=0o755)  # executable, but a shell may not find it
    monkeypatch.setattr("sys.argv", ["chain.py", "--yes"])
    assert CommandLine.typed() == CommandLine((sys.executable, "chain.py", "--yes"), "my recipes")


def test_a_program_on_path_is_shown_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_program("nemo") == str(own_program("nemo"))
    monkeypatch.setenv("PATH", str(own_program("nemo").parent))
    assert shown_program("nemo") == "nemo"


def test_a_changed_command_runs_the_whole_chain() -> None:
    typed = CommandLine(("nemo", *PIPELINE, "--until", "data", "--only=report", "a.b=1"))
    changed = typed.changed({"dir": "runs/b", "a.b": 2})
    assert changed.words == ("nemo", *PIPELINE[:4], "dir=runs/b", "a.b=2", "--yes")


@pytest.mark.parametrize("text", ["", "echo 'a", "nemo a\nnemo b"])
def test_another_text_is_no_command(text: str) -> None:
    assert CommandLine.read(text) is None
