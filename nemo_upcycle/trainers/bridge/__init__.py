"""Online upcycling in Megatron-Bridge: models, the start of a run, its data and metrics, conversion of classes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.requirements import requirement


#: The releases that this package knows.
RELEASES = requirement("megatron-bridge>=0.6.2,<0.7")


def require_bridge() -> None:
    """Check that Megatron-Bridge is installed, in a release that this package knows.

    Raises:
        UpcycleError: it is not.
    """
    try:
        got = version("megatron-bridge")
    except PackageNotFoundError:
        got = "none"
    if got == "none" or not RELEASES.allows(got):
        raise UpcycleError(
            "Megatron-Bridge",
            got=got,
            expected=RELEASES.bounds,
            fix=f'pip install "{RELEASES.argument}" with Python 3.12, or take NVIDIA\'s container of it',
        )
