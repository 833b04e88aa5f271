"""Turn a pretrained dense LLM into a Mixture-of-Experts model inside the training job that continues it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.checkout import explain_missing_parts


if TYPE_CHECKING:
    from nemo_upcycle.online.receipt import UpcycleReceipt
    from nemo_upcycle.online.upcycle import load_dense_into, upcycle_into
    from nemo_upcycle.sources.resolve import open_dense
    from nemo_upcycle.spec import UpcycleSpec

__all__ = ["UpcycleReceipt", "UpcycleSpec", "__version__", "load_dense_into", "open_dense", "upcycle_into"]

explain_missing_parts()

_HOMES = {
    "UpcycleSpec": "spec",
    "UpcycleReceipt": "online.receipt",
    "open_dense": "sources.resolve",
    "upcycle_into": "online.upcycle",
    "load_dense_into": "online.upcycle",
}


def __getattr__(name: str) -> Any:
    # Import on demand, so that light tools start without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
