"""Turn a pretrained dense Llama into a Mixture-of-Experts model inside the NeMo training job that continues it."""

from __future__ import annotations

import sys


if "".join(getattr(sys, "argv", ())[:1]).endswith("nemo-upcycle"):  # the command: Ctrl-C as it starts, no traceback
    import _signal  # signal takes longer to import

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from typing import TYPE_CHECKING, Any

from nemo_upcycle.init import methods, routers  # noqa: F401 - they hand their names to the spec
from nemo_upcycle.models import families  # noqa: F401 - they hand themselves to the architecture
from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.checkout import require_one_checkout
from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


if TYPE_CHECKING:
    from nemo_upcycle.online.receipt import UpcycleReceipt
    from nemo_upcycle.online.upcycle import load_dense_into, upcycle_into
    from nemo_upcycle.sources import open_dense
    from nemo_upcycle.spec import UpcycleSpec

__all__ = ["UpcycleReceipt", "UpcycleSpec", "__version__", "load_dense_into", "open_dense", "upcycle_into"]

require_one_checkout()
need_no_cuda_to_import()

_HOMES = {
    "UpcycleSpec": "spec",
    "UpcycleReceipt": "online.receipt",
    "open_dense": "sources",
    "upcycle_into": "online.upcycle",
    "load_dense_into": "online.upcycle",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that light tools start without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
