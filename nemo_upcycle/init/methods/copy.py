"""Plain copies, as in the paper (arXiv 2412.09952, section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_upcycle.init.methods import Method, register


if TYPE_CHECKING:
    from nemo_upcycle.init.experts import ExpertMatrix
    from nemo_upcycle.spec import UpcycleSpec


@register
class Copy(Method):
    """Leave every copy as it is. Exact."""

    name, summary = "copy", "exact copies"
    computes = False

    def change(self, spec: UpcycleSpec, matrix: ExpertMatrix) -> None:
        """Change nothing."""
