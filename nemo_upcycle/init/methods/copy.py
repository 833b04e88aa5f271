"""Plain copies, as in the paper (arXiv 2412.09952, section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.methods import init_method


if TYPE_CHECKING:
    from nemo_upcycle.init.experts import ExpertMatrix
    from nemo_upcycle.spec import UpcycleSpec


@init_method("exact copies", computes=False)
def copy(matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
    """Leave every copy as it is."""
