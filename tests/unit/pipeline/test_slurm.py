"""Calls of Slurm's commands and reactions to their answers; bash scripts stand in for the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import slurm
from nemo_upcycle.pipeline.executors.base import UnreachableError
from nemo_upcycle.pipeline.executors.jobs import Job, Phase
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler
from nemo_upcycle.pipeline.executors.slurm_script import in_vain, missing_mounts
from nemo_upcycle.pipeline.stage_jobs import jobs_of
from nemo_upcycle.pipeline.stages import BY_NAME, RunPlan
from tests.unit.pipeline.test_executors import SITE, built, data, script_of, training, write_commands


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands, for a cluster of other machines."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return write_commands(
        tmp_path / "bin",
        sbatch="echo 7",
        sinfo="echo node1; echo node2",
        scontrol="echo 'ClusterName             = alps'",
    )


@pytest.mark.parametrize("word", ["start", "stop"])
def test_test_cluster_leaves_a_site_of_its_own_alone(commands: Path, tmp_path: Path, word: str) -> None:
    conf, did = tmp_path / "slurm.conf", tmp_path / "did"
    conf.write_text("ClusterName=alps\n")
    write_commands(commands, **dict.fromkeys(("apt-get", "dpkg", "scancel", "su"), f"echo $0 >> {did}; exit 1"))
    environment = os.environ | {"SLURM_CONF": str(conf), "SLURM_TEST_DIR": str(tmp_path / "cluster")}
    script = Path(__file__).parents[3] / "scripts/slurm_cluster.sh"
    done = subprocess.run(["bash", script, word], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "not this test cluster's" in done.stderr) == (1, True)
    assert (conf.read_text(), did.exists()) == ("ClusterName=alps\n", False)


def test_distinguishes_jobs_of_two_clusters_on_one_file_system(commands: Path) -> None:
    assert SlurmScheduler(built(*SITE)).identity == "Slurm, cluster alps"
    write_commands(commands, scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UnreachableError, match="which cluster this is: Unable to contact"):
        SlurmScheduler(built(*SITE)).identity  # noqa: B018


def test_new_job_may_fail_once_whatever_an_earlier_one_did(tmp_path: Path) -> None:
    job = data(tmp_path)
    job.folder.mkdir(parents=True)
    in_vain(job).touch()
    assert SlurmScheduler(built(*SITE)).submit(job, []) == "7"
    assert not in_vain(job).exists()


def test_inputs_that_only_this_machine_sees_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {tmp_path: "lustre", Path("/data"): "ext4"}
    monkeypatch.setattr(slurm, "filesystem_type", kinds.get)
    cluster = SlurmScheduler(built(*SITE))
    cluster.check([Job("data", tmp_path, ("python",), reads=(tmp_path,))])
    with pytest.raises(UpcycleError, match=r"^/data is on a file system of type ext4, which "):
        cluster.check([Job("data", tmp_path, ("python",), reads=(Path("/data"),))])
    monkeypatch.setattr(slurm, "filesystem_type", lambda path: "ext4")
    with pytest.raises(UpcycleError, match=f"^Folder {tmp_path} is on a file system of type ext4"):
        cluster.check([Job("data", tmp_path, ("python",))])
    SlurmScheduler(built(*SITE, "shared_dir=true")).check([Job("data", tmp_path, ("python",))])


@pytest.mark.parametrize(
    ("words", "pretrain", "data_stage"),
    [
        (["container_image=null", "stages.pretrain.container_image=nemo"], "python", sys.executable),
        (["container_image=nemo", "stages.pretrain.container_image=null"], sys.executable, "python"),
        (["container_image=nemo", "python=/opt/bin/python", "stages.data.python=py3"], "/opt/bin/python", "py3"),
    ],
)
def test_interpreter_is_the_containers_or_the_one_named(words: list[str], pretrain: str, data_stage: str) -> None:
    for job, python in ((training(), pretrain), (data(), data_stage)):
        assert f" {python} -m nemo_upcycle.pipeline {job.name} " in script_of(job, *words)
    launched = script_of(training(), *words, "stages.pretrain.hang_detection=true")
    assert launched.count(f" {pretrain} -m ") == 2  # ft_launcher runs with the same Python


def test_container_sees_what_a_blend_and_a_suite_name(tmp_path: Path) -> None:
    mine, suite = tmp_path / "home/mine.yaml", tmp_path / "asked/suite.yaml"
    for folder in ("home", "asked", "own"):
        (tmp_path / folder).mkdir()
    suite.write_text(f"{{tasks: {{own: [0]}}, local: false, include_path: {tmp_path}/own}}")
    mine.write_text(f"sources: {{web: {{train: [{tmp_path}/texts/*.txt]}}}}")
    plan = RunPlan("tiny", "hf:///models/8b", str(mine), str(suite), "", None)
    (job,) = jobs_of([BY_NAME["data"]], Path("/runs/a"), plan)
    script = script_of(job, "container_image=nemo")
    seen = ["/runs/a", mine.parent, tmp_path / "texts", suite.parent, tmp_path / "own", "/models/8b"]
    mounts = ",".join(f"{path}:{path}" for path in seen)
    assert f"--container-mounts {mounts},/runs/a/jobs/data:/nemo_run " in script


def test_a_container_keeps_hub_models_in_the_run() -> None:
    named = script_of(data(), "container_image=nemo", "env_vars={'B': '1'}", "container_env=[A]")
    assert 'export HF_HUB_CACHE="/shared/run/hub"\n' in named
    assert " --container-env A,HF_HUB_CACHE,B " in named
    assert "HF_HUB_CACHE" not in script_of(data(), "container_image=null")
    own = script_of(data(), "container_image=nemo", "env_vars={'HF_HOME': '/shared/hf'}")
    assert ("HF_HUB_CACHE" in own, 'export HF_HOME="/shared/hf"\n' in own) == (False, True)


def test_job_leaves_the_allocation_around_it(commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_commands(commands, sbatch=f"env > {tmp_path}/env; echo 7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/mine.conf")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")

    def seen() -> list[str]:
        SlurmScheduler(built(*SITE)).submit(data(tmp_path), [])
        return sorted(line for line in (tmp_path / "env").read_text().splitlines() if line.startswith("SLURM_"))

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "SLURM_MEM_PER_CPU=100" in seen()  # from the user's own profile
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert seen() == ["SLURM_CONF=/etc/slurm/mine.conf"]


@pytest.mark.parametrize("printed", ["7", "Welcome to alps\nMaintenance on 24.12.\n7;alps", "7\nbye"])
def test_a_job_id_is_found_among_a_sites_words(commands: Path, tmp_path: Path, printed: str) -> None:
    write_commands(commands, sbatch=f"cat <<'E'\n{printed}\nE")
    assert SlurmScheduler(built(*SITE)).submit(data(tmp_path), []) == "7"


@pytest.mark.parametrize(
    ("answer", "hint", "no_hint", "kind"),
    [
        ("invalid partition specified: h100", "Partitions: node1, node2", "account", UpcycleError),
        ("Invalid account or account/partition combination", "run.executor.account", "Partitions:", UpcycleError),
        ("QOSMaxSubmitJobPerUserLimit", "--until", "Partitions:", UpcycleError),
        ("Unable to contact slurm controller (connect failure)", "Unable to contact", "Fix", UnreachableError),
    ],
)
def test_a_refusal_names_its_setting(
    commands: Path, tmp_path: Path, answer: str, hint: str, no_hint: str, kind: type[UpcycleError]
) -> None:
    write_commands(commands, sbatch=f'echo "sbatch: error: {answer}" >&2; exit 1')
    with pytest.raises(UpcycleError, match=hint) as caught:
        SlurmScheduler(built(*SITE)).submit(data(tmp_path), [])
    assert type(caught.value) is kind
    assert no_hint not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("stages.pretrain.gpus_per_node=4", "gpus_per_node"),
        ("heterogeneous=true", "heterogeneous"),
        ("launcher=torchrun", "launcher"),
        ("env_vars={'A-B': 'x'}", "'A-B'"),
    ],
)
def test_setting_that_cannot_work_is_refused_by_name(word: str, name: str) -> None:
    with pytest.raises(UpcycleError, match=name):
        SlurmScheduler(built(*SITE, word)).check_settings([training()])


def test_a_mount_holds_the_run_by_its_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "lustre").symlink_to(tmp_path / "scratch")
    job = data(Path("/lustre/run"))
    assert missing_mounts(job, ["/scratch/lustre:/lustre"]) == ["/lustre/run:/lustre/run"]
    assert missing_mounts(job, ["/lustre:/lustre"]) == []
    assert missing_mounts(data(tmp_path / "lustre/run"), [f"{tmp_path}/scratch:{tmp_path}/lustre:ro"]) == []


@pytest.mark.parametrize(
    ("reason", "phase", "fix"),
    [
        ("Priority", Phase.WAITING, "Priority"),
        ("JobHeldUser", Phase.WAITING, "scontrol release 7"),
        ("launch failed requeued held", Phase.WAITING, "scontrol release 7"),
        ("PartitionDown", Phase.WAITING, "partition"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-8]", Phase.WAITING, "sinfo -R"),
        ("QOSMaxJobsPerUserLimit", Phase.WAITING, "have ended"),
        ("MaxNodePerAccount", Phase.WAITING, "have ended"),
        ("PartitionTimeLimit", Phase.ENDED, "lower `time`"),
        ("PartitionNodeLimit", Phase.ENDED, "fewer nodes"),
        ("AssocMaxNodePerJobLimit", Phase.ENDED, "qos"),
        ("BadConstraints", Phase.ENDED, "constraint"),
        ("InvalidAccount", Phase.ENDED, "account"),
        ("DependencyNeverSatisfied", Phase.ENDED, "DependencyNeverSatisfied"),
    ],
)
def test_reason_that_does_not_pass_is_named_with_a_fix(commands: Path, reason: str, phase: Phase, fix: str) -> None:
    write_commands(commands, squeue=f"echo '7|PENDING|{reason}|h100|'")
    state = SlurmScheduler(built(*SITE)).states(["7"])["7"]
    assert (state.phase, state.is_abandoned) == (phase, phase is Phase.ENDED)
    assert fix in state.reason


def test_reason_of_one_of_several_partitions_ends_nothing(commands: Path) -> None:
    write_commands(commands, squeue="echo '7|PENDING|PartitionTimeLimit|short,long|'")
    assert SlurmScheduler(built(*SITE)).states(["7"])["7"].phase is Phase.WAITING


SECRET = "env_vars={HF_TOKEN: hf_abc, HF_HOME: /hf}"


def test_a_script_with_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    own = ["stages.data.env_vars={WANDB_API_KEY: 'a \"b'}", "stages.data.setup_lines=export X_PASSWORD='c d'; true"]
    for words, secrets in (([], ()), ([SECRET], ("hf_abc",)), (own, ('a \\"b', "c d"))):
        cluster = SlurmScheduler(built(*SITE, *words))
        (script,) = cluster.write(data(tmp_path), tmp_path)
        assert all(secret in script.read_text() for secret in secrets)
        assert (script.stat().st_mode & 0o077 == 0) is bool(secrets)
        shown = cluster.masked().render(data(tmp_path))["data.sh"]
        assert not any(secret in shown for secret in secrets)
    assert 'export HF_HOME="/hf"' in SlurmScheduler(built(*SITE, SECRET)).masked().render(data())["data.sh"]
