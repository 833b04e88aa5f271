"""Router initialisation from prompts: each row is computed from the mean MoE input of one copy's prompts.

mergekit's MoE merges call this initialisation "hidden".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import router_init


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@router_init(from_data=True)
def prompts(spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Read the rows from the calibration file, which `online/calibration.py` makes from the prompts.

    The router sends a token to the copy whose prompts have similar activations.
    """
    from nemo_upcycle.init.calibration_file import calibration_of

    calibration = calibration_of(spec)
    assert calibration is not None
    return calibration.router(layer).double() * spec.router_spread
