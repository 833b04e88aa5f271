"""`nemo upcycle pipeline` as a user starts it, a process of its own, on a tiny model: stopped, resumed, failed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.utils.files import MARKER
from tests.functional.tiny import write_blend_file, write_inputs
from tests.unit.pipeline.test_local import processes_of
from tests.waiting import HANG_S, wait_until


pytestmark = [pytest.mark.slow, pytest.mark.full]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the script's recipe names; the run goes there, too, from test to test."""
    return write_inputs(tmp_path_factory.mktemp("launch"))


class Launcher:
    """The command, running."""

    def __init__(self, inputs: Path, *words: str, **variables: str) -> None:
        self.log = inputs / "console.txt"
        factory = f"tiny(inputs='{inputs}')"
        self.command = [sys.executable, str(ROOT / "tests/functional/tiny_pipeline.py"), "--factory", factory, *words]
        environment = os.environ | {"NEMORUN_HOME": str(inputs / "home"), "PYTHONPATH": str(ROOT)} | variables
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, "--yes"], env=environment, stdout=log, stderr=log, cwd=inputs, start_new_session=True
            )

    def text(self) -> str:
        """Read the log of the command."""
        return self.log.read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Wait until the training has done a step."""
        wait_until(lambda: f"\nstep {step}/6 " in self.text(), self.process, self.text)


def test_sigint_stops_the_stage_and_prints_how_to_continue(inputs: Path) -> None:
    launcher = Launcher(inputs, HOLD_AT="3")
    launcher.wait_for_step(3)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.process.wait(HANG_S) == 130
    assert processes_of(inputs) == []
    assert not (inputs / "run/pretrain" / MARKER).exists()
    last = launcher.text().splitlines()[-2:]
    assert last[0].startswith(
        f"Stopped by SIGINT in stage 'pretrain'. Kept in {inputs}/run: finished stages: import, data, upcycle; "
        "last checkpoint of pretrain: "
    )
    assert "step=1" in last[0]
    head, _, command = last[1].partition(": ")
    assert head == "Resume with the same command"
    assert shlex.split(command) == ["python", *launcher.command[1:], "--yes"]
    assert (inputs / "run/command.txt").read_text() == command + "\n"
    recipe = (inputs / "run/recipes/pretrain.yaml").read_text()
    assert "trainer.max_steps: 6\n" in recipe
    assert "resume.restore_config.spec.num_experts: 8\n" in recipe


def test_edited_files_and_another_interval_of_checkpoints_do_not_end_a_started_run(inputs: Path) -> None:
    blend = inputs / "texts/blend.yaml"
    blend.write_text("# a comment\n" + blend.read_text())
    launcher = Launcher(inputs, "pretrain.log.ckpt.every_n_train_steps=3", HOLD_AT="3")
    launcher.wait_for_step(3)
    assert "[data] done before, from the same inputs" in launcher.text()
    assert "\nstep 2/6 " not in launcher.text()  # it is in the checkpoint that the test before left
    assert "changed setting: pretrain.log.ckpt.every_n_train_steps was 2, is 3\n" in launcher.text()
    write_blend_file(inputs / "texts", "max_epochs: 8")  # a later stage must not look at it
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.process.wait(HANG_S) == 130
    assert "finished stages: import, data, upcycle;" in launcher.text()
    launcher = Launcher(inputs)
    assert launcher.process.wait(HANG_S) == 2
    assert "data.max_epochs was not set, is 8" in launcher.text()
    write_blend_file(inputs / "texts")


def test_the_same_command_resumes_and_starts_nothing_after_a_failed_rank(inputs: Path) -> None:
    launcher = Launcher(inputs, FAIL_AT="4")
    assert launcher.process.wait(HANG_S) == 1
    assert "\nstep 3/6 " in launcher.text()
    assert "\nstep 2/6 " not in launcher.text()  # it is in the checkpoint that the test before left
    assert launcher.text().endswith("RuntimeError: rank 1 met its fate\n")
    assert [name for name in ("dense_ct", "export", "evaluate", "report") if (inputs / "run" / name).exists()] == []
    assert processes_of(inputs) == []
