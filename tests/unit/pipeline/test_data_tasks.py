"""The data engine's tasks on a site's Slurm, and the executor settings that the tasks use."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.data_tasks import data_task_options


SITE = """executor: slurm
account: me
partition: cpu
container_image: {image}
container_mounts: [/shared]
env_vars: {{HF_HOME: /shared/hf, HF_TOKEN: hf_secret, NEMO_UPCYCLE_DATA_PYTHON: /shared/env/bin/python}}
additional_parameters: {{reservation: night}}
stages:
  data: {{qos: low, time: "12:00:00", cpus_per_task: 64, mem: 128G}}
"""


def _options(folder: Path, text: str, **changes: str) -> tuple[tuple[str, ...], dict[str, str]]:
    file = folder / "site.yaml"
    file.write_text(text, encoding="utf-8")
    found = data_task_options(str(file), Path("/shared/blend"), **changes)
    return found.words, found.variables


def test_tasks_take_the_account_and_limits_of_the_data_stage(tmp_path: Path) -> None:
    words, variables = _options(tmp_path, SITE.format(image="null"))
    assert words == (
        *("--slurm", "cpu", "--time", "12:00:00", "--sbatch=account=me", "--sbatch=qos=low"),
        *("--sbatch=reservation=night", "--task-python=/shared/env/bin/python"),
    )
    assert variables == {"HF_HOME": "/shared/hf", "HF_TOKEN": "hf_secret"}


def test_tasks_run_in_the_container(tmp_path: Path) -> None:
    words, _ = _options(tmp_path, SITE.format(image="/images/nemo.sqsh"))
    assert words[-4:-1] == (
        "--srun=--container-image=/images/nemo.sqsh",
        "--srun=--container-mounts=/shared",
        "--srun=--container-env=HF_HOME,HF_TOKEN",
    )


def test_time_of_the_command_line_wins(tmp_path: Path) -> None:
    words, _ = _options(tmp_path, SITE.format(image="null"), time="1-00:00:00")
    assert words[3] == "1-00:00:00"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("executor: kubernetes\n", "is a file for another scheduler"),
        ("executor: slurm\n", "site.yaml: account"),
        (SITE.format(image="null").replace("partition: cpu", "partition: null"), "site.yaml: partition"),
        (SITE.format(image="null").replace("12:00:00", "noon"), "stages.data.time"),
        (SITE.format(image="null") + "setup_lines: module load cuda\n", "setup_lines"),
        (SITE.format(image="a").replace("NEMO_UPCYCLE_DATA_PYTHON", "OTHER"), "NEMO_UPCYCLE_DATA_PYTHON"),
    ],
)
def test_refuses_a_file_that_tasks_cannot_use(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UpcycleError, match=problem):
        _options(tmp_path, text)
