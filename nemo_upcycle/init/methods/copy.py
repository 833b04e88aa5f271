"""Plain copies, as in the paper (arXiv 2412.09952, section 2)."""

from __future__ import annotations

from nemo_upcycle.init.methods import Method, register


@register
class Copy(Method):
    """Leave every copy as it is. Exact."""

    name, summary = "copy", "exact copies"
    computes = False
