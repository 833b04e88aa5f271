"""The files that a stage's process leaves in its folder after it is stopped, fails or is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.errors import StageStopped
from nemo_upcycle.package_info import __version__
from nemo_upcycle.pipeline import runner
from nemo_upcycle.pipeline.markers import ENDED
from nemo_upcycle.pipeline.stages import BY_NAME, RunPlan
from nemo_upcycle.utils.files import in_use
from tests.functional.tiny import write_parent, write_texts


#: A stand-in for the data environment's Python. The stand-in reads the first documents as the original Python does.
PYTHON = f"""#!/bin/bash
[[ "$3" = *.sample ]] && exec {sys.executable} "$@"
[ "${{@: -1}}" = --version ] && echo "nemo-upcycle {__version__}, datatrove" && exit
"""
#: An engine that sends SIGTERM to its parent process like Slurm, so that the parent process stops the engine.
ENGINE = f"""{PYTHON}
trap 'exit 143' TERM
kill -TERM $PPID
sleep 60 &>/dev/null & wait
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has imported its dense parent."""
    parent, blend = write_parent(tmp_path / "parent"), write_texts(tmp_path / "texts")
    folder, plan = tmp_path / "run", RunPlan("tiny", str(parent), str(blend), "demo", "", None)
    folder.mkdir()
    plan.write(folder)
    stage = BY_NAME["import"]
    inputs = stage.inputs(folder, plan)
    stage.folder(folder, plan).start(inputs, resumable=False)
    stage.folder(folder, plan).finish(inputs, 1.0, {"dense_folder": str(parent)})
    return folder


@pytest.fixture
def data_stage(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """A function that runs the stage with a script as the data environment's Python, and returns its status."""
    # Otherwise the runner silences libraries for the tests that follow.
    monkeypatch.setattr(runner, "is_verbose", lambda: True)
    python = run_dir.parent / "python"
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", str(python))

    def run(engine: str) -> int:
        python.write_text(engine)
        python.chmod(0o755)
        with pytest.raises(SystemExit) as ended:
            runner.run_stage("data", str(run_dir))
        return int(ended.value.code or 0)

    return run


def test_a_stopped_data_stage_says_so_and_resumes(
    run_dir: Path, data_stage: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_stage(ENGINE) == StageStopped.exit_status
    assert (run_dir / "data" / ENDED).read_text() == "stopped\n"
    assert "stage 'data' stopped early" in capsys.readouterr().err


def test_refused_second_start_records_nothing(
    run_dir: Path, data_stage: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with in_use(run_dir / "data"):
        assert data_stage(ENGINE) == 2
    assert "in use by another run" in capsys.readouterr().err
    assert not (run_dir / "data" / ENDED).exists()


def test_failed_stage_records_it(run_dir: Path, data_stage: Callable[[str], int]) -> None:
    assert data_stage("#!/bin/bash\nexit 1\n") == 2
    assert (run_dir / "data" / ENDED).read_text() == "failed\n"


def test_a_stage_says_why_on_a_full_disk(
    run_dir: Path, data_stage: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run_dir / "data" / ENDED
    assert data_stage(f"{PYTHON}ln -s /dev/full {ended}\nexit 2\n") == 2
    assert ended.is_symlink()
    assert capsys.readouterr().err.splitlines()[-1].startswith("[data] ")


def test_a_stop_runs_the_command_of_notify(run_dir: Path, data_stage: Callable[[str], int]) -> None:
    plan = RunPlan.read(run_dir)
    replace(plan, notify=f"tee -a {run_dir / 'told'}").write(run_dir)
    assert data_stage(ENGINE) == StageStopped.exit_status
    assert data_stage("#!/bin/bash\nexit 1\n") == 2
    told = (run_dir / "told").read_text()
    assert told.startswith(f"{run_dir}: data stopped\nstage 'data' stopped early")
    assert f"{run_dir}: data failed\n" in told
