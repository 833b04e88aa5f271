"""Online upcycling in Megatron-Bridge: models, the start of a run, its data and metrics, conversion of classes."""

from __future__ import annotations

from functools import cache

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.ranks import is_first_rank
from nemo_upcycle.utils.requirements import installed_release, requirement


#: The releases that this package was written for. The extra `bridge` of pyproject.toml does not name Megatron-Bridge.
RELEASES = requirement("megatron-bridge>=0.6.0,<0.8")
#: Results of `fit_of`: how a release fits.
FITS, NEWER, TOO_OLD = "fits", "newer", "too old"


def fit_of(release: str) -> str:
    """Return how a release of Megatron-Bridge fits: `FITS`, `NEWER` (used with a warning) or `TOO_OLD`.

    Args:
        release: version; a local part (+b558c98) is ignored.

    Example:
        >>> fit_of("0.5.1"), fit_of("0.7.1"), fit_of("0.8.0")
        ('too old', 'fits', 'newer')
    """
    if RELEASES.allows(release):
        return FITS
    return NEWER if RELEASES.is_below(release) else TOO_OLD


def newer_release(release: str) -> str:
    """Return the warning that a release is newer than the releases that this package was written for."""
    return f"Megatron-Bridge {release} is newer than this package knows ({RELEASES.bounds}). It may fail."


def require_bridge() -> None:
    """Check that Megatron-Bridge is installed and not too old; warn once if the release is newer than known.

    Raises:
        UpcycleError: Megatron-Bridge is missing or too old.
    """
    release = installed_release("megatron-bridge")
    if release is None or fit_of(release) == TOO_OLD:
        raise UpcycleError(
            "Megatron-Bridge",
            kind="missing",
            got=f"is {release}, which is too old" if release else "is not installed",
            fix=(
                f'run `pip install "{RELEASES.argument}"` with Python 3.12, or use NVIDIA\'s container that has it'
                f" ({RELEASES.bounds})"
            ),
        )
    if fit_of(release) == NEWER and is_first_rank():
        _warn(newer_release(release))


@cache
def _warn(text: str) -> None:
    from nemo_upcycle.utils.progress import show_messages  # imports rich, which `doctor` must not need

    show_messages().warning("%s", text)
