"""Where and how stages run on Slurm, as a site sets it, and what NeMo-Run's batch script can hold."""

# No postponed annotations: NeMo-Run parses the executor's fields by them.

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from nemo_run.config import RUNDIR_NAME

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import Job
from nemo_upcycle.pipeline.executors.ft import SILENCE_S


#: What NeMo-Run puts into its script without quotes, and the folder whose name it replaces in it.
_PLAIN_PATH, _REPLACED = re.compile(r"[\w./+=@%~-]+"), f"/{RUNDIR_NAME}"


@dataclass(kw_only=True)
class StagedSlurmExecutor(run.SlurmExecutor):
    """NeMo-Run's `SlurmExecutor`, with what each stage asks for; a file of conf/executors describes one.

    Attributes:
        stages: by stage, the fields that differ from this executor's; nodes and ranks of trainings are their recipes'.
        hang_detection: whether trainings run under NVIDIA's `ft_launcher`, one a node, which restarts hung ranks.
        silence_s: seconds between two signs of life of a rank; saving a checkpoint before an early end is silent, too.
        card: of a GPU, as `nemo-upcycle plan --gpu` names it, for --dryrun.
        price_per_gpu_hour: for --dryrun; None: not known.
        shared_dir: whether nodes see `dir`, `dense` and `data` although their file system looks like one machine's.
        packager: what is sent along: nothing, the package is installed on the nodes.
        origins: by field, where its value was set, for people.
    """

    packager: run.Packager = field(default_factory=run.Packager)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    hang_detection: bool = False
    silence_s: float = SILENCE_S
    card: str = "h100"
    price_per_gpu_hour: Optional[float] = None  # noqa: UP045 - NeMo-Run cannot parse `float | None`
    shared_dir: bool = False
    origins: dict[str, str] = field(default_factory=dict)


#: What a site has to fill in, where its file has "???".
REQUIRED = {
    "account": "the account that jobs are charged to",
    "partition": "a partition of GPU nodes; `sinfo` lists them",
    "container_image": "an image with NeMo, or null without containers",
}


def escaped(value: str) -> str:
    """Return a value as it stands between double quotes in bash; variables in it are expanded."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")


def require_plain(path: Path, *, in_container: bool) -> None:
    """Check that NeMo-Run's batch script can hold a path."""
    if not _PLAIN_PATH.fullmatch(str(path)):
        raise UpcycleError(
            f"path '{path}'",
            got="a character that NeMo-Run's batch script does not quote",
            expected="letters, digits and . _ / + = @ % ~ -",
            fix="rename the folder, or make a link to it with a plain name",
        )
    if _REPLACED in str(path) and not in_container:
        raise UpcycleError(
            f"path '{path}'",
            got=f"'{_REPLACED}' in it, which NeMo-Run replaces in its batch scripts",
            expected="another name",
            fix="rename the folder, or make a link to it",
        )


def missing_mounts(job: Job, mounts: Sequence[str]) -> list[str]:
    """Return mounts, under their own path, of what a stage reads and writes and no mount of the user's holds."""
    inside = [mount.split(":")[1] if ":" in mount else mount for mount in mounts]
    missing: list[str] = []
    for path in (job.run_dir, *job.reads):
        if not any(path.is_relative_to(folder) for folder in [*inside, *missing]):
            missing.append(str(path))
    return [f"{path}:{path}" for path in missing]
