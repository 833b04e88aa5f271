"""Executors from YAML files and the command line, and their batch scripts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nemo_run as run
import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.site_file import cluster_for, read_executor
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler


SITE = ["account=me", "partition=h100", "container_image=null"]


def built(*overrides: str, name: str = "slurm") -> run.SlurmExecutor:
    return read_executor(name, overrides)


def training(run_dir: Path = Path("/shared/run")) -> Job:
    command = ("python", "-m", "nemo_upcycle.pipeline", "pretrain", str(run_dir))
    is_one = {"is_training": True, "is_resumable": True}
    return Job("pretrain", run_dir, command, ("upcycle",), nodes=64, ranks_per_node=8, **is_one)


def script_of(job: Job, *words: str) -> str:
    """Render the batch script of a job for a site with these settings."""
    return SlurmScheduler(built(*SITE, *words)).render(job)[f"{job.name}.sh"]


@pytest.mark.parametrize("missing", ["account", "partition", "container_image"])
def test_what_a_site_must_fill_in_is_named(missing: str) -> None:
    given = [word for word in SITE if not word.startswith(missing)]
    (refused,) = SlurmScheduler(built(*given)).wrong_settings([training()])
    assert (refused.subject, refused.got) == (f"run.executor.{missing}", "is missing")


SET = "but the pipeline sets it itself"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("executor: [slurm]", "executor '['slurm']' does not exist"),
        ("time: 24:00:00", "time is 86400; expected text, because YAML reads 24:00:00 as a number"),
        ("stages: {pretrian: {time: '1'}}", "stages: stage 'pretrian' does not exist"),
        ("stages: [pretrain]", "stages is ['pretrain']; expected keys"),
        ("nodes: 2", f"nodes is 2, {SET}"),
        ("stages: {pretrain: {ntasks_per_node: 4}}", f"stages.pretrain.ntasks_per_node is 4, {SET}"),
        ("executor: kubernetes\nretries: 3", f"retries is 3, {SET}"),
        ("executor: kubernetes\nstages: {pretrain: {cpus: 1.5}}", "stages.pretrain.cpus is 1.5; expected a whole"),
        ("env_vars: {A: }", "env_vars.A is null; expected text"),
    ],
)
def test_mistakes_in_a_file_name_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text if text.startswith("executor") else f"executor: slurm\n{text}")
    with pytest.raises(UpcycleError) as caught:
        read_executor(str(path))
    assert str(caught.value).startswith(f"{path}: {words}")


def test_entries_of_a_mapping_are_added_one_by_one(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("{executor: slurm, env_vars: {A: file}, stages: {data: {env_vars: {D: file}}}}", encoding="utf-8")
    words = ["env_vars.A=1", "env_vars.B=b", "performance.NCCL_NVLS_ENABLE=null"]
    made = read_executor(str(site), [*words, "stages.pretrain.env_vars.C={c}", "stages.data.env_vars.B=2"])
    assert made.env_vars == {"A": "1", "B": "b"}
    assert made.performance == {"NCCL_NVLS_ENABLE": None}
    assert made.stages["pretrain"]["env_vars"] == {"A": "1", "B": "b", "C": "{c}"}
    assert made.stages["data"]["env_vars"] == {"D": "file", "B": "2"}


@pytest.mark.parametrize(
    ("word", "subject", "got"),
    [
        ("partion=a", "run.executor: key", "partion"),
        ("stages.pretrain.tme=1", "run.executor.stages.pretrain: key", "tme"),
        ("stages.pretrain.cpus_per_task=many", "run.executor.stages.pretrain.cpus_per_task", "'many'"),
        ("stages={data: {time: '1'}}", "run.executor.stages", "is {'data': {'time': '1'}}, " + SET),
        ("env_vars={a", "run.executor.env_vars", "'{a'"),
    ],
)
def test_mistakes_are_named_as_they_were_typed(word: str, subject: str, got: object) -> None:
    with pytest.raises(UpcycleError) as caught:
        read_executor("slurm", [word])
    assert (caught.value.subject, caught.value.got) == (subject, got)


def test_what_is_left_blank_is_the_fields_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("executor: slurm\nenv_vars:\ncontainer_mounts:\nstages: {import: , data: {env_vars: }}")
    executor = built(name=str(path))
    assert (executor.env_vars, executor.container_mounts) == ({}, [])
    assert executor.stages == {"import": {}, "data": {"env_vars": {}}}


@pytest.mark.parametrize(("word", "flag"), [("true", "#SBATCH --exclusive\n"), ("user", "#SBATCH --exclusive=user\n")])
def test_a_field_of_bool_or_text_reads_booleans(word: str, flag: str) -> None:
    on, off = (script_of(training(), f"stages.pretrain.exclusive={value}") for value in (word, "false"))
    assert flag in on
    assert "exclusive" not in off


def test_a_users_own_slurm_executor_is_taken_as_it_is() -> None:
    cluster = cluster_for(run.SlurmExecutor(account="me", time="01:00:00", setup_lines="module load cuda"))
    assert cluster is not None
    script = cluster.render(training())["pretrain.sh"]
    assert "#SBATCH --time=01:00:00\n" in script
    assert "module load cuda" in script
    assert cluster_for(run.LocalExecutor()) is None
    with pytest.raises(UpcycleError) as refused:
        cluster_for(type("SkypilotExecutor", (), {})())
    assert (refused.value.subject, refused.value.got) == ("run.executor", "SkypilotExecutor")


def data(run_dir: Path = Path("/shared/run")) -> Job:
    command = ("python", "-m", "nemo_upcycle.pipeline", "data", str(run_dir))
    return Job("data", run_dir, command, ("import",), is_resumable=True)


def write_commands(folder: Path, **texts: str) -> Path:
    """Write a bash script in place of each named command of Slurm, and return the scripts' folder for PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def decide(job: Job, ranks: str, *, state: str = "RUNNING", limit: str = "") -> subprocess.CompletedProcess[str]:
    """Run a rendered batch script with bash; the stand-ins for Slurm's commands only print."""
    scontrol = f'echo "scontrol $*"; echo JobState={state} PreemptTime=None TimeLimit={limit} TimeMin=N/A'
    commands = write_commands(job.run_dir / "bin", srun=ranks, scontrol=scontrol, sleep=":")
    script = script_of(job).replace("head_node_ip=$(srun", "head_node_ip=$(true")
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    return subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=False)


SAVE = "mkdir -p {0}/pretrain/checkpoints/a--step={1}-last/weights; touch $_/.metadata"


KEPT, NO_FURTHER = SAVE.replace("{1}", "12"), SAVE.replace("{1}", "3")
STOPPED, FAILED = "; echo stopped > {0}/pretrain/_ENDED; exit 75", "; echo failed > {0}/pretrain/_ENDED; exit 2"


@pytest.mark.parametrize(
    ("ranks", "state", "in_vain", "status", "requeued"),
    [
        ("touch {0}/pretrain/_SUCCESS.json", "RUNNING", True, 0, False),
        (KEPT + STOPPED, "RUNNING", True, 1, True),
        # A rank was killed, but the run advanced.
        (KEPT + "; exit 137", "RUNNING", True, 1, True),
        (KEPT + "; exit 143", "COMPLETING", False, 1, False),  # the job was cancelled
        (KEPT + FAILED, "RUNNING", False, 2, False),
        (KEPT + "; touch {0}/pretrain/checkpoints/a--step=12-last-unfinished; exit 1", "RUNNING", True, 1, False),
        (NO_FURTHER + "; exit 75", "RUNNING", False, 1, True),  # requeued once, because a node may have failed
        (NO_FURTHER + "; exit 75", "RUNNING", True, 1, False),
        ("exit 1", "RUNNING", True, 1, False),
        # The job was killed before the training started; _ENDED is from an earlier job.
        ("exit 137", "RUNNING", False, 1, True),
    ],
)
def test_a_batch_script_requeues_while_the_step_advances(
    tmp_path: Path, ranks: str, state: str, in_vain: bool, status: int, requeued: bool
) -> None:
    earlier = tmp_path / "pretrain/checkpoints/a--step=9-last/weights"
    earlier.mkdir(parents=True)
    (earlier / ".metadata").touch()
    (tmp_path / "pretrain/_ENDED").write_text("failed\n")  # written by an earlier start
    in_vain_file = tmp_path / "jobs/pretrain/in_vain"
    if in_vain:
        in_vain_file.parent.mkdir(parents=True)
        in_vain_file.touch()
    done = decide(training(tmp_path), ranks.format(tmp_path), state=state)
    assert ("scontrol requeue 7" in done.stdout) == requeued, done.stdout + done.stderr
    assert done.returncode == status
    assert not (status == 0 and in_vain_file.exists())


@pytest.mark.parametrize(
    ("limit", "set_up_s", "said", "requeued"),
    [
        ("00:11:00", 50, "start-up took 50 s of 60 s; raise run.executor.stages.pretrain.time", False),
        ("1-00:10:00", 70_000, "start-up took 70000 s of 86400 s", False),
        ("00:11:00", 40, "start-up took 40 s of 60 s", True),
        ("UNLIMITED", 70_000, "", True),
    ],
)
def test_a_slow_start_is_not_requeued_forever(
    tmp_path: Path, limit: str, set_up_s: int, said: str, requeued: bool
) -> None:
    (tmp_path / "jobs/pretrain").mkdir(parents=True)
    (tmp_path / "jobs/pretrain/in_vain").touch()  # the start before this one saved no further step
    started, ready = tmp_path / "jobs/pretrain/started", tmp_path / "pretrain/training.json"
    ranks = f"{KEPT}; touch -d @1000 {started}; touch -d @{1000 + set_up_s} {ready}; exit 75"
    done = decide(training(tmp_path), ranks.format(tmp_path), limit=limit)
    assert ("scontrol requeue 7" in done.stdout) == requeued, done.stdout + done.stderr
    assert ("start-up took" in done.stdout) == bool(said)
    assert said in done.stdout


@pytest.mark.parametrize(
    ("ranks", "status"),
    [("touch {0}/import/_SUCCESS.json; exit 139", 0), ("echo failed > {0}/import/_ENDED; exit 2", 2), ("exit 139", 1)],
)
def test_every_batch_script_ends_by_its_stages_marker(tmp_path: Path, ranks: str, status: int) -> None:
    (tmp_path / "import").mkdir()
    done = decide(Job("import", tmp_path, ("true",)), ranks.format(tmp_path))
    assert done.returncode == status, done.stdout + done.stderr
    assert "requeue" not in done.stdout


@pytest.mark.parametrize(("tasks", "requeued"), [(3, True), (2, False)])
def test_a_script_requeues_the_data_stage_while_tasks_get_finished(tmp_path: Path, tasks: int, requeued: bool) -> None:
    finished = tmp_path / "data/blend/build/logs/tokenise/completions"
    finished.mkdir(parents=True)
    for task in range(2):
        (finished / f"{task:05}").touch()
    (tmp_path / "jobs/data").mkdir(parents=True)
    (tmp_path / "jobs/data/in_vain").touch()
    ranks = f"touch {finished}/0000{tasks - 1}; echo stopped > {tmp_path}/data/_ENDED; exit 75"
    done = decide(data(tmp_path), ranks)
    assert ("scontrol requeue 7" in done.stdout) == requeued, done.stdout + done.stderr
    assert f"tasks: {tasks}" in done.stdout


@pytest.mark.parametrize("run_dir", ["/shared/my runs/a", "/shared/nemo_runs/a"])
def test_paths_that_a_batch_script_cannot_hold_are_refused(run_dir: str) -> None:
    with pytest.raises(UpcycleError) as refused:
        SlurmScheduler(built(*SITE)).check_settings([training(Path(run_dir))])
    assert refused.value.subject == f"Path '{run_dir}'"


def test_hang_detection_starts_one_launcher_a_node() -> None:
    script = script_of(training(), "stages.pretrain.hang_detection=true", "env_vars={'http_proxy': 'a b'}")
    for words in ("#SBATCH --ntasks-per-node=1\n", "#SBATCH --cpus-per-task=96\n", "--nproc-per-node=8 "):
        assert words in script
    assert '--rdzv-id="$SLURM_JOB_ID"' in script
    assert 'export http_proxy="a b"\n' in script
    assert "numactl" not in script, "of the launcher, all ranks would be bound alike"


@pytest.mark.parametrize(("signal", "save_s"), [("TERM@600", 1800), ("TERM@3060", 3060)])
def test_a_launcher_leaves_ranks_the_time_that_the_signal_gives(signal: str, save_s: int) -> None:
    script = script_of(training(), "stages.pretrain.hang_detection=true", f"stages.pretrain.signal={signal}")
    assert f"--term-timeout={save_s}" in script.replace(".0", "")


@pytest.mark.parametrize(
    ("signal", "seconds", "what"), [("TERM", 60, "signal TERM"), ("null", 30, "KillWait, 30 s by default")]
)
def test_a_job_saves_within_its_signals_time(signal: str, seconds: int, what: str) -> None:
    (limit,) = SlurmScheduler(built(*SITE, f"stages.pretrain.signal={signal}")).save_limits(training())
    assert limit.seconds == seconds
    assert limit.what.startswith(what)


def test_rendered_jobs_come_with_a_script_that_submits_them(tmp_path: Path) -> None:
    jobs = [Job("import", tmp_path, ("true",)), Job("data", tmp_path, ("true",), ("import",))]
    (tmp_path / "submit.sh").write_text(SlurmScheduler(built(*SITE)).render_chain(jobs)["submit.sh"])
    commands = write_commands(tmp_path / "bin", sbatch='echo "Welcome to alps"; echo "7;alps"; echo "$*" >&2')
    script, environment = ["bash", tmp_path / "submit.sh"], {"PATH": f"{commands}:/usr/bin:/bin"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "--requeue --parsable import.sh\n--requeue --parsable --dependency=afterok:7 data.sh\n"
    assert (tmp_path / "jobs/data").is_dir()
