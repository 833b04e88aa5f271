"""Executors as YAML files and the command line describe them, and the batch scripts that follow."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nemo_run as run
import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import Job, require_settings
from nemo_upcycle.pipeline.executors.settings import cluster_for, is_described, read_executor
from nemo_upcycle.pipeline.executors.slurm import REQUIRED, SlurmScheduler


SITE = ["account=me", "partition=h100", "container_image=null"]


def built(*overrides: str, name: str = "slurm") -> run.SlurmExecutor:
    import fiddle as fdl

    return fdl.build(read_executor(name, overrides))


def training(run_dir: Path = Path("/shared/run")) -> Job:
    command = ("python", "-m", "nemo_upcycle.pipeline", "pretrain", str(run_dir))
    return Job(
        "pretrain", run_dir, command, ("upcycle",), nodes=64, ranks_per_node=8, is_training=True, is_resumable=True
    )


def test_a_stage_gets_its_own_resources_and_the_recipes_ranks() -> None:
    cluster = cluster_for(built(*SITE))
    assert isinstance(cluster, SlurmScheduler)
    script = cluster.render(training())["pretrain.sh"]
    for flag in ("nodes=64", "ntasks-per-node=8", "gpus-per-node=8", "partition=h100", "signal=TERM@600"):
        assert f"#SBATCH --{flag}\n" in script
    assert "torchrun" not in script
    other = cluster.render(Job("import", Path("/shared/run"), ("true",)))["import.sh"]
    assert "gpus-per-node" not in other
    assert "progress()" not in other
    assert "/shared/run/jobs/import/log-" in other  # not the folder of the stage rendered before


def test_a_container_sees_what_a_stage_reads_and_writes() -> None:
    cluster = cluster_for(
        built("account=me", "partition=h100", "container_image=nemo", "container_mounts=['/data:/data']")
    )
    assert cluster is not None
    job = Job("import", Path("/runs/a"), ("true",), reads=(Path("/data/text"), Path("/models/8b"), Path("/runs/a/x")))
    script = cluster.render(job)["import.sh"]
    mounts = "/data:/data,/runs/a:/runs/a,/models/8b:/models/8b,/runs/a/jobs/import:/nemo_run"
    assert f"--container-mounts {mounts} " in script


def test_the_command_line_overrides_one_stage_and_says_so() -> None:
    executor = built(*SITE, "stages.pretrain.time=08:00:00", "stages.evaluate.gpus_per_node=4", "cpus_per_task=8")
    assert executor.stages["pretrain"]["time"] == "08:00:00"
    assert executor.stages["evaluate"]["gpus_per_node"] == 4
    assert (executor.time, executor.cpus_per_task, executor.container_image) == ("01:00:00", 8, None)
    assert executor.origins["stages.pretrain.time"] == executor.origins["account"] == "command line"
    assert executor.origins["time"] == "conf/executors/slurm.yaml"


@pytest.mark.parametrize("missing", ["account", "partition", "container_image"])
def test_what_a_site_must_fill_in_is_named(missing: str) -> None:
    given = [word for word in SITE if not word.startswith(missing)]
    with pytest.raises(UpcycleError, match=rf"run.executor.{missing}: got nothing.*Fix: give run.executor.{missing}="):
        require_settings(built(*given), "copy conf/executors/slurm.yaml", REQUIRED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("executor: slrum", "got slrum, expected .*slurm"),
        ("executor: slurm\ntime: 24:00:00", 'got 86400: YAML reads .* Fix: put it in quotes: "24:00:00"'),
        ("executor: slurm\npartion: a", "setting 'partion' .* does not exist. Did you mean 'run.executor.partition'?"),
        ("executor: slurm\nstages: {pretrian: {time: '1'}}", "'pretrian' does not exist. Did you mean 'pretrain'?"),
        (
            "executor: slurm\nstages: {pretrain: {tme: '1'}}",
            "'stages.pretrain.tme' .*Did you mean 'run.executor.stages",
        ),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UpcycleError, match=message):
        read_executor(str(path))


def test_numbers_are_text_where_slurm_takes_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("executor: slurm\nmem: 0\ntime: 04:00:00\nstages: {pretrain: {exclusive: true, mem: 64}}")
    executor = read_executor(str(path), ["mem=12"])
    assert (executor.mem, executor.time) == ("12", "04:00:00")
    assert executor.stages["pretrain"] == {"exclusive": True, "mem": "64"}


def test_names_of_factories_stay_theirs() -> None:
    assert is_described("slurm")
    assert is_described("site.yml")
    assert not is_described("my_cluster")


def test_a_users_own_slurm_executor_is_taken_as_it_is() -> None:
    cluster = cluster_for(run.SlurmExecutor(account="me", time="01:00:00", setup_lines="module load cuda"))
    assert cluster is not None
    script = cluster.render(training())["pretrain.sh"]
    assert "#SBATCH --time=01:00:00\n" in script
    assert "module load cuda" in script
    assert cluster_for(run.LocalExecutor()) is None


def decide(
    folder: Path, ranks: str, *, state: str = "RUNNING", signal: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a rendered batch script with bash; what stands for Slurm's commands prints, and requeues nothing."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in {
        "srun": ranks,
        "scontrol": f'echo "scontrol $*"; echo JobState={state} PreemptTime=None',
        "sleep": ":",
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    cluster = cluster_for(built(*SITE))
    assert cluster is not None
    script = cluster.render(training(folder))["pretrain.sh"].replace("head_node_ip=$(srun", "head_node_ip=$(true")
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    return subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=False)


SAVE = "mkdir -p {0}/pretrain/checkpoints/a--step={1}-last/weights; touch $_/.metadata"


@pytest.mark.parametrize(
    ("ranks", "state", "status", "requeued"),
    [
        ("touch {0}/pretrain/_SUCCESS.json", "RUNNING", 0, False),
        (f"{SAVE.replace('{1}', '12')}; echo stopped > {{0}}/pretrain/_ENDED; exit 75", "RUNNING", 1, True),
        (f"{SAVE.replace('{1}', '12')}; exit 137", "RUNNING", 1, True),  # a rank was killed, but the run got further
        (f"{SAVE.replace('{1}', '12')}; exit 143", "COMPLETING", 1, False),  # cancelled
        (f"{SAVE.replace('{1}', '12')}; echo failed > {{0}}/pretrain/_ENDED; exit 2", "RUNNING", 2, False),
        (f"{SAVE.replace('{1}', '3')}; exit 75", "RUNNING", 1, False),  # no further than at the start
        ("exit 1", "RUNNING", 1, False),
    ],
)
def test_a_batch_script_requeues_while_the_step_advances(
    tmp_path: Path, ranks: str, state: str, status: int, requeued: bool
) -> None:
    earlier = tmp_path / "pretrain/checkpoints/a--step=9-last/weights"
    earlier.mkdir(parents=True)
    (earlier / ".metadata").touch()
    done = decide(tmp_path, ranks.format(tmp_path), state=state)
    assert ("scontrol requeue 7" in done.stdout) == requeued, done.stdout + done.stderr
    assert done.returncode == status
