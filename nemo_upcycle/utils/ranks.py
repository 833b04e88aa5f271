"""Which rank of a job this process is."""

from __future__ import annotations

import os


def is_first_rank() -> bool:
    """Return whether this is the rank that writes and speaks for all; a single process is."""
    # torchrun and ft_launcher say RANK; srun alone, without a launcher, says SLURM_PROCID.
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
