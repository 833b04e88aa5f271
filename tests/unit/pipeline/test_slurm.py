"""What is asked of Slurm's commands, and done with their answers; bash stands for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import slurm
from nemo_upcycle.pipeline.executors.base import Job, UnreachableError
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler
from nemo_upcycle.pipeline.executors.slurm_script import in_vain
from nemo_upcycle.pipeline.jobs import jobs_of
from nemo_upcycle.pipeline.plan import RunPlan
from nemo_upcycle.pipeline.stages import BY_NAME
from tests.unit.pipeline.test_executors import SITE, built, data, training, write_commands


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, of a cluster of other machines."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return write_commands(
        tmp_path / "bin",
        sbatch="echo 7",
        sinfo="echo node1; echo node2",
        scontrol="echo 'ClusterName             = alps'",
    )


@pytest.mark.parametrize(
    ("words", "file", "text"),
    [
        (["start"], "slurm.conf", "ClusterName=alps"),
        (["start"], "slurm.conf", "ClusterName=test\nNodeName=node[1-9]"),
        (["start"], "slurmdbd.conf", "StoragePass=secret"),
        (["stop"], "slurm.conf", "ClusterName=alps"),
        (["start", "--accounting"], "", ""),  # where a MariaDB answers
    ],
)
def test_test_cluster_leaves_a_site_of_its_own_alone(
    commands: Path, tmp_path: Path, words: list[str], file: str, text: str
) -> None:
    did = tmp_path / "did"
    fakes = dict.fromkeys(("apt-get", "dpkg", "mariadb-admin", "scancel", "su"), f"echo $0 >> {did}; exit 1")
    write_commands(commands, mariadb="exit 0", **fakes)
    site = tmp_path / "etc"
    site.mkdir()
    if file:
        (site / file).write_text(f"{text}\n")
    environment = os.environ | {"SLURM_CONF": str(site / "slurm.conf"), "SLURM_TEST_DIR": str(tmp_path / "cluster")}
    script = Path(__file__).parents[3] / "scripts/slurm_cluster.sh"
    done = subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not this test cluster's" in done.stderr
    assert [path.name for path in site.iterdir()] == ([file] if file else [])
    assert not did.exists()


def test_jobs_of_two_clusters_on_one_file_system_are_told_apart(commands: Path) -> None:
    assert SlurmScheduler(built(*SITE)).identity == "Slurm, cluster alps"
    write_commands(commands, scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UnreachableError, match="which cluster this is: Unable to contact"):
        SlurmScheduler(built(*SITE)).identity  # noqa: B018


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Invalid qos specification", UpcycleError),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", UnreachableError),
        ("Batch job submission failed: Socket timed out on send/recv operation", UnreachableError),
    ],
)
def test_controller_that_does_not_answer_refuses_nothing(
    commands: Path, tmp_path: Path, answer: str, kind: type[UpcycleError]
) -> None:
    write_commands(commands, sbatch=f"echo 'sbatch: error: {answer}' >&2; exit 1")
    with pytest.raises(UpcycleError, match=answer.partition("(")[0]) as caught:
        SlurmScheduler(built(*SITE)).submit(data(tmp_path), [])
    assert type(caught.value) is kind


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
    with pytest.raises(UpcycleError, match=r"^/data: got a file system of type ext4, which this machine alone sees"):
        cluster.check([Job("data", tmp_path, ("python",), reads=(Path("/data"),))])
    monkeypatch.setattr(slurm, "filesystem_type", lambda path: "ext4")
    with pytest.raises(UpcycleError, match=f"^dir {tmp_path}: got a file system of type ext4"):
        cluster.check([Job("data", tmp_path, ("python",))])


@pytest.mark.parametrize(
    ("image", "of_stage", "pretrain", "data_stage"),
    [("null", "nemo", "python", sys.executable), ("nemo", "null", sys.executable, "python")],
)
def test_interpreter_is_that_of_the_stages_own_container(
    image: str, of_stage: str, pretrain: str, data_stage: str
) -> None:
    words = [*SITE[:2], f"container_image={image}", f"stages.pretrain.container_image={of_stage}"]
    for job, python in ((training(), pretrain), (data(), data_stage)):
        for more in ((), ("stages.pretrain.hang_detection=true",)):
            script = SlurmScheduler(built(*words, *more)).render(job)[f"{job.name}.sh"]
            assert f" {python} -m nemo_upcycle.pipeline {job.name} " in script


def test_container_sees_what_a_blend_names(tmp_path: Path) -> None:
    mine = tmp_path / "home/mine.yaml"
    mine.parent.mkdir()
    mine.write_text(f"sources: {{web: {{train: [{tmp_path}/texts/*.txt]}}}}")
    plan = RunPlan("tiny", "hf:///models/8b", str(mine), "demo", "", None)
    (job,) = jobs_of([BY_NAME["data"]], Path("/runs/a"), plan)
    script = SlurmScheduler(built(*SITE[:2], "container_image=nemo")).render(job)["data.sh"]
    seen = ["/runs/a", mine.parent, tmp_path / "texts", "/models/8b"]
    mounts = ",".join(f"{path}:{path}" for path in seen)
    assert f"--container-mounts {mounts},/runs/a/jobs/data:/nemo_run " in script


def test_stages_in_containers_keep_models_of_the_hub_in_the_run() -> None:
    def script(*words: str) -> str:
        return SlurmScheduler(built(*SITE[:2], *words)).render(data())["data.sh"]

    assert 'export HF_HUB_CACHE="/shared/run/hub"\n' in script("container_image=nemo")
    assert "HF_HUB_CACHE" not in script("container_image=null")
    own = script("container_image=nemo", "env_vars={'HF_HOME': '/shared/hf'}")
    assert "HF_HUB_CACHE" not in own
    assert 'export HF_HOME="/shared/hf"\n' in own
