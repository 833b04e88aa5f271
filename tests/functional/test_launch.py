"""`nemo upcycle pipeline` as a user starts it, in its own process. A tiny run is stopped, is resumed, and fails."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from nemo_upcycle.utils.command_line import CommandLine
from nemo_upcycle.utils.files import MARKER
from tests.functional.started import CHAIN, Command
from tests.functional.tiny import write_blend_file, write_inputs
from tests.unit.pipeline.test_local import processes_of


pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the script's recipe names; each test continues the same run in it."""
    return write_inputs(tmp_path_factory.mktemp("launch"))


def _launch(inputs: Path, *words: str, **variables: str) -> Command:
    log = inputs / "console.txt"
    log.unlink(missing_ok=True)
    factory = f"tiny(inputs='{inputs}')"
    return Command(log, CHAIN, "--factory", factory, *words, "--yes", NEMORUN_HOME=f"{inputs}/home", **variables)


def _wait_for_step(launcher: Command, step: int) -> None:
    launcher.wait_for(lambda: f"\nstep {step}/6 " in launcher.text())


def test_sigint_stops_the_stage_and_prints_how_to_continue(inputs: Path) -> None:
    launcher = _launch(inputs, HOLD_AT="3")
    _wait_for_step(launcher, 3)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == 130
    assert processes_of(inputs) == []
    assert not (inputs / "run/pretrain" / MARKER).exists()
    last = launcher.text().splitlines()[-2:]
    assert last[0].startswith(
        f"Stopped by SIGINT in stage 'pretrain'. Kept in {inputs}/run: finished stages: import, data, upcycle; "
        "last checkpoint of pretrain: "
    )
    assert "step=1" in last[0]
    head, _, line = last[1].partition(": ")
    assert head == "Resume with the same command"
    command = CommandLine.read(line)
    assert command is not None
    assert command.words[1:] == tuple(launcher.words[1:])
    assert (inputs / "run/command.txt").read_text() == f"cd {inputs} && {line}\n"
    recipe = (inputs / "run/recipes/pretrain.yaml").read_text()
    assert "trainer.max_steps: 6\n" in recipe
    assert "resume.restore_config.spec.num_experts: 8\n" in recipe


def test_a_started_run_survives_harmless_edits(inputs: Path) -> None:
    blend = inputs / "texts/blend.yaml"
    blend.write_text("# a comment\n" + blend.read_text())
    launcher = _launch(inputs, "pretrain.log.ckpt.every_n_train_steps=3", HOLD_AT="3")
    _wait_for_step(launcher, 3)
    assert "[data] done earlier, from the same inputs" in launcher.text()
    assert "\nstep 2/6 " not in launcher.text()  # the checkpoint of the previous test has this step
    assert "changed setting: pretrain.log.ckpt.every_n_train_steps was 2, is 3\n" in launcher.text()
    write_blend_file(inputs / "texts", "max_epochs: 8")  # a later stage must not read this change
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.wait() == 130
    assert "finished stages: import, data, upcycle;" in launcher.text()
    launcher = _launch(inputs)
    assert launcher.wait() == 2
    assert "data.max_epochs was not set, is 8" in launcher.text()
    write_blend_file(inputs / "texts")


def test_the_same_command_resumes_after_a_failed_rank(inputs: Path) -> None:
    log, line = inputs / "console.txt", (inputs / "run/command.txt").read_text()
    log.unlink()
    launcher = Command.pasted(log, f"cd / && {line}", FAIL_AT="4", NEMORUN_HOME=f"{inputs}/home")
    assert launcher.wait() == 1
    assert "\nstep 3/6 " in launcher.text()
    assert "\nstep 2/6 " not in launcher.text()  # the checkpoint of the previous test has this step
    assert launcher.text().endswith("RuntimeError: rank 1 met its fate\n")
    assert [name for name in ("dense_ct", "export", "evaluate", "report") if (inputs / "run" / name).exists()] == []
    assert processes_of(inputs) == []
