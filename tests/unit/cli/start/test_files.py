"""`start` writes its choices as files for both trainers, and never overwrites an edited file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.cli.start.choices import Choices, Wanted, choose
from nemo_upcycle.cli.start.files import (
    CLUSTER,
    blend_text,
    command_of_a_run,
    differing_lines,
    recipe_text,
    run_command,
    write_files,
)
from nemo_upcycle.cli.start.parent import FoundParent
from nemo_upcycle.cli.start.texts import Texts
from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.utils.command_line import CommandLine


PARENT = FoundParent("/models/mine", known_shape("llama3_8b"), None)
TEXTS = Texts({"texts": {"train": ["/texts/**/*.txt"], "options": {"text_key": "body"}}}, 2_000_000, 2 * 10**9, {})


def _chosen(trainer: str, gpus: int) -> Choices:
    return choose(PARENT, TEXTS, trainer, Wanted({}, gpus=gpus, gpu="h100" if gpus else None))


@pytest.mark.parametrize("trainer", ["nemo", "bridge"])
@pytest.mark.parametrize("gpus", [0, 64])
def test_a_recipe_is_python_and_says_what_was_chosen(trainer: str, gpus: int) -> None:
    made = _chosen(trainer, gpus)
    text = recipe_text(PARENT, made)
    compile(text, "recipe.py", "exec")
    assert max(map(len, text.splitlines())) < 140
    assert "UpcycleSpec(num_experts=8, top_k=2)" in text
    assert f"seq_length={made.seq_length}" in text
    if made.plan and made.plan.layout.tp > 1:
        name = "tensor_parallelism" if trainer == "nemo" else "tensor_model_parallel_size"
        assert f"{name}={made.plan.layout.tp}" in text


def test_a_blend_reads_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text(blend_text(TEXTS, _chosen("nemo", 0)))
    config = read_blend(tmp_path / "blend.yaml").config
    assert config.sources["texts"].options == {"text_key": "body"}
    assert (config.seq_length, config.hold_out.heldout) == (128, 0.001)


def test_files_are_written_once_and_differences_are_named(tmp_path: Path) -> None:
    files = {"recipe.py": "one\n", "blend.yaml": "two\n"}
    assert write_files(tmp_path / "new", files)
    assert not write_files(tmp_path / "new", files)
    assert differing_lines(tmp_path / "new", files) == {}
    (tmp_path / "new/recipe.py").write_text("edited\n")
    assert differing_lines(tmp_path / "new", files) == {"recipe.py": ["-edited", "+one"]}


@pytest.fixture
def _shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.mark.usefixtures("_shell")
def test_the_command_finds_the_recipe_wherever_its_folder_is(tmp_path: Path) -> None:
    made = _chosen("nemo", 0)
    assert str(run_command(Path("runs/my run"), PARENT, made, is_here=True)).startswith("PYTHONPATH='runs/my run' ")
    bridge = str(run_command(tmp_path, PARENT, replace(made, trainer="bridge"), is_here=True))
    assert "recipe=recipe:pretrain dense_ct=recipe:dense_ct gpus=2" in bridge


def test_the_command_keeps_a_python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/site")
    assert run_command(Path("run"), PARENT, _chosen("nemo", 0), is_here=True).python_path == "run:/site"


def test_gpus_elsewhere_are_a_clusters() -> None:
    command = run_command(Path("run"), PARENT, _chosen("nemo", 64), is_here=False)
    assert command.words[-5:] == (*CLUSTER, "--dryrun")


def test_the_newest_run_of_a_folder_is_gone_on_with(tmp_path: Path) -> None:
    assert command_of_a_run(tmp_path) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run/command.txt").write_text("cd /here && nemo upcycle pipeline dir=a --yes\n")
    assert command_of_a_run(tmp_path) == CommandLine(("nemo", "upcycle", "pipeline", "dir=a", "--yes"), "", "/here")
