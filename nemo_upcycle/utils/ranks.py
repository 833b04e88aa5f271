"""The rank of this process in its job."""

from __future__ import annotations

import os


def is_first_rank() -> bool:
    """Return whether this process writes files and messages for all ranks; True for a single process."""
    # torchrun and ft_launcher set RANK. srun without a launcher sets only SLURM_PROCID.
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
