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
        card: of a GPU, as `nemo-upcycle plan --gpu` names it, for --dryrun and for the performance settings.
        performance: by name, what differs from `conf/performance.yaml`; None removes a setting.
        price_per_gpu_hour: for --dryrun; None: not known.
        shared_dir: whether nodes see `dir`, `dense` and `data` although their file system looks like one machine's.
        python: the interpreter of the stages; None: `python` of the container, or this one without a container.
        packager: what is sent along: nothing, the package is installed on the nodes.
        origins: by field, where its value was set, for people.
    """

    packager: run.Packager = field(default_factory=run.Packager)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    hang_detection: bool = False
    silence_s: float = SILENCE_S
    card: str = "h100"
    performance: dict[str, Any] = field(default_factory=dict)
    price_per_gpu_hour: Optional[float] = None  # noqa: UP045 - NeMo-Run cannot parse `float | None`
    shared_dir: bool = False
    python: Optional[str] = None  # noqa: UP045
    origins: dict[str, str] = field(default_factory=dict)


#: What a site has to fill in, where its file has "???".
REQUIRED = {
    "account": "the account that jobs are charged to",
    "partition": "a partition of GPU nodes; `sinfo` lists them",
    "container_image": "an image with NeMo, or null without containers",
}


def signal_s(signal: Optional[str]) -> int:  # noqa: UP045 - as the executor's fields
    """Return the seconds between a signal that a job asks for and the end of its time; 0 without one.

    Example:
        >>> signal_s("B:TERM@600"), signal_s("TERM"), signal_s(None)
        (600, 60, 0)
    """
    return int(signal.partition("@")[2] or 60) if signal else 0


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


#: Fields of NeMo-Run's executor that one job a stage, of one process a rank, cannot have: what to do instead.
_UNSUPPORTED = {
    "array": "omit it: a stage is one job",
    "heterogeneous": "omit it: all nodes of a stage are alike; set what differs between stages in `stages`",
    "launcher": "omit it: srun starts every rank; hang_detection=true starts them under ft_launcher",
}
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def require_supported(mine: run.SlurmExecutor, job: Job) -> None:
    """Check what a stage's settings ask for against what its batch script can do.

    Args:
        mine: the executor with the settings of the stage.
        job: of the stage.

    Raises:
        UpcycleError: a setting would be ignored, or would fail on the nodes.
    """
    for name, fix in _UNSUPPORTED.items():
        if value := getattr(mine, name, None):
            raise UpcycleError(f"run.executor.{name}", got=value, expected="nothing", fix=fix)
    for name in mine.env_vars:
        if not _VARIABLE.fullmatch(str(name)):
            raise UpcycleError(
                f"run.executor.env_vars: variable '{name}'",
                got="a name that no shell exports",
                expected="letters, digits and _, no digit first",
                fix=f"rename it, as {re.sub(r'[^A-Za-z0-9_]', '_', str(name))}",
            )
    if job.is_training and mine.gpus_per_node is not None and mine.gpus_per_node < job.ranks_per_node:
        raise UpcycleError(
            f"run.executor.stages.{job.name}.gpus_per_node",
            got=f"{mine.gpus_per_node}, for {job.ranks_per_node} ranks on each node",
            expected=f"a GPU for each rank ({job.ranks_per_node})",
            fix=f"raise it, or set {job.name}.trainer.devices={mine.gpus_per_node} and more trainer.num_nodes",
        )


def missing_mounts(job: Job, mounts: Sequence[str]) -> list[str]:
    """Return mounts, under their own path, of what a stage reads and writes and no mount of the user's holds."""
    missing: list[str] = []
    for path in (job.run_dir, *job.reads):
        if not any(_holds(mount, path) for mount in [*mounts, *missing]):
            missing.append(f"{path}:{path}")
    return missing


def _holds(mount: str, path: Path) -> bool:
    """Return whether a mount, `HOST:CONTAINER`, shows in the container under a path what lies there on the host."""
    host, _, rest = mount.partition(":")
    inside = Path(rest.partition(":")[0] or host)
    return path.is_relative_to(inside) and (Path(host) / path.relative_to(inside)).resolve() == path.resolve()
