"""Several stages at once on this machine, as real processes that leave the stages' markers without importing NeMo."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline import run_here
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.plan import Stage, WorkPlan
from nemo_upcycle.pipeline.stages import STAGES, RunPlan
from tests.unit.pipeline.test_local import processes_of
from tests.waiting import wait_until


#: Code that marks a stage as done; the process's own work comes before this code.
_FINISH = """
from pathlib import Path
from nemo_upcycle.pipeline.markers import StageFolder
reads = tuple(sys.argv[3:])
folder = StageFolder(run_dir, name, reads)
inputs = folder.inputs(dict.fromkeys((name, *reads), {}))
folder.start(inputs, resumable=False)
folder.finish(inputs, 1.0, {})
"""
_WAIT_FOR = """
(run_dir / ('here-' + name)).write_text(str(os.getpid()))
while not (run_dir / 'here-{other}').is_file():
    time.sleep(0.05)
"""
#: Wait until the launcher has collected the exit status of another process, which removes the process from /proc.
_WAIT_FOR_END = """
while Path('/proc', (run_dir / 'here-{other}').read_text()).exists():
    time.sleep(0.05)
"""


@dataclass(frozen=True)
class Processes(WorkPlan):
    """Stages with the code of their processes, and the stages that each stage needs."""

    file = "processes.json"
    kind = "processes"
    code: dict[str, str]
    needs: dict[str, tuple[str, ...]]

    @property
    def stages(self) -> tuple[Stage, ...]:
        def nothing(run_dir: Path, plan: Any) -> dict[str, Any]:
            raise AssertionError

        return tuple(Stage(name, nothing, self.needs.get(name, ()), (), parallel=True) for name in self.code)

    def training_text(self, stage: str) -> None:
        return None

    @property
    def inputs(self) -> Inputs:
        raise AssertionError

    def jobs(self, run_dir: Path) -> list[Job]:
        head = "import os, sys, time; from pathlib import Path; name, run_dir = sys.argv[1], Path(sys.argv[2])\n"
        jobs = []
        for stage in self.stages:
            words = (stage.name, str(run_dir), *self.reads[stage.name])
            command = (sys.executable, "-c", head + self.code[stage.name], *words)
            jobs.append(Job(stage.name, run_dir, command, stage.after, is_training=True))
        return jobs


def run_stages(run_dir: Path, code: dict[str, str], needs: dict[str, tuple[str, ...]], at_once: int = 2) -> None:
    plan = Processes(code, needs)
    run_here.run_stages(plan.jobs(run_dir), run_dir, plan, at_once=at_once)


def test_stages_that_do_not_need_each_other_run_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = {
        "first": _FINISH,
        "one": _WAIT_FOR.format(other="two") + _FINISH,
        "two": _WAIT_FOR.format(other="one") + _FINISH,
        "last": "assert all((run_dir / one / '_SUCCESS.json').is_file() for one in ('one', 'two'))" + _FINISH,
    }
    needs = {"one": ("first",), "two": ("first",), "last": ("one", "two")}
    run_stages(tmp_path, code, needs)
    said = capfd.readouterr().err
    assert said.index("[two] started:") < said.index("[one] done")
    # A stage may start while the process of a stage that it needs, which is done, still ends.
    assert said.endswith(" done; 0 trainings left\n")
    assert said.count("] done") == len(code)
    run_stages(tmp_path, code, needs)
    assert capfd.readouterr().err.count("done earlier, from the same inputs") == 4


def test_after_a_failure_nothing_starts_and_others_finish(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = {
        "bad": _WAIT_FOR.format(other="good") + "sys.exit('it broke')",
        "good": _WAIT_FOR.format(other="bad") + _WAIT_FOR_END.format(other="bad") + _FINISH,
        "later": _FINISH,
    }
    with pytest.raises(SystemExit) as ended:
        run_stages(tmp_path, code, {})
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert "it broke\n[bad] did not finish." in said
    assert "[good] done" in said
    assert not (tmp_path / "later").exists()


_NOISE = "sys.stderr.write('[' + name + '] began\\nNeMo says much\\n[' + name + '] goes on\\n'); "


def test_a_terminal_shows_only_what_stages_say_themselves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_here, "has_live_lines", lambda: True)
    run_stages(tmp_path, dict.fromkeys(("one", "two"), _NOISE + _FINISH), {}, at_once=1)
    assert capfd.readouterr().err == "[one] began\n[one] goes on\n[two] began\n[two] goes on\n"
    assert "NeMo says much" in (tmp_path / "logs/one-rank0.log").read_text()


@pytest.mark.parametrize(
    ("end", "words"), [("sys.exit('it broke')", "NeMo says much"), ("sys.exit(2)", "[bad] goes on")]
)
def test_a_failed_stage_shows_its_end_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, end: str, words: str
) -> None:
    monkeypatch.setattr(run_here, "has_live_lines", lambda: True)
    with pytest.raises(SystemExit):
        run_stages(tmp_path, {"bad": _NOISE + end}, {}, at_once=1)
    said = capfd.readouterr().err
    assert said.count(words) == said.count("[bad] goes on") == 1
    assert ("it broke" in said) == ("broke" in end) == (f"--- {tmp_path}/logs/bad-rank0.log" in said)


def test_sigterm_ends_all_of_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = dict.fromkeys(("one", "two", "three"), "(run_dir / name).touch(); time.sleep(600)")

    def strike() -> None:
        wait_until(lambda: all((tmp_path / name).is_file() for name in ("one", "two")))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run_stages(tmp_path, code, {})
    assert ended.value.code == 143
    assert processes_of(tmp_path) == []
    assert not (tmp_path / "three").exists()
    assert re.search("Stopped by SIGTERM in stage '(one' and 'two|two' and 'one)'", capfd.readouterr().err)


def test_an_error_of_the_launcher_ends_what_runs(tmp_path: Path) -> None:
    newer = '{"schema": 9, "inputs": {}, "outputs": {}}'
    damage = f"(run_dir / name).mkdir(); (run_dir / name / '_SUCCESS.json').write_text('{newer}')"
    with pytest.raises(UpcycleError):
        run_stages(tmp_path, {"one": damage, "two": "time.sleep(600)"}, {})
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("sys.stderr.write('[bad] a mistake\\n'); sys.exit(2)", 2, "[bad] a mistake\n"),
        ("os.kill(os.getpid(), 9)", 1, "stage 'bad' was ended by SIGKILL (out of memory?)"),
    ],
)
def test_a_killed_stage_is_reported_as_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: str, status: int, words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_stages(tmp_path, {"bad": code}, {})
    assert ended.value.code == status
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("at_once", "is_here", "has_gpus", "words"),
    [
        (0, True, False, "at_once is 0; expected"),
        (2, False, False, "at_once 2 cannot be combined with an executor"),
        (2, True, True, "at_once 2 is not possible on GPUs"),
    ],
)
def test_at_once_is_refused_where_it_cannot_be(
    at_once: int, is_here: bool, has_gpus: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    with pytest.raises(UpcycleError, match=words):
        run_here.check_at_once(at_once, is_here=is_here)
    run_here.check_at_once(1, is_here=is_here)


def test_threads_are_the_users_or_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_here.variables_for(1, None) == {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert run_here.variables_for(10_000, None) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_here.variables_for(2, None) == {"OMP_NUM_THREADS": "3"}
    mine = run.LocalExecutor(env_vars={"OMP_NUM_THREADS": "5", "MINE": "1"})
    assert run_here.variables_for(2, mine) == {"OMP_NUM_THREADS": "5", "MINE": "1"}


def test_a_stage_that_ended_before_the_signal_is_finished(tmp_path: Path) -> None:
    plan, stage = RunPlan("tiny", "asset://smollm2-135m", "sotu", "demo", "", None), STAGES[0]
    folder = stage.folder(tmp_path, plan)
    folder.path.mkdir()
    folder.finish(stage.inputs(tmp_path, plan), 1.0, {})
    text = run_here.stopped(signal.SIGTERM, [stage], tmp_path, plan)
    assert f"Stopped by SIGTERM in stage 'import'. Kept in {tmp_path}: finished stages: import.\n" in text
