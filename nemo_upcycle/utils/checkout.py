"""Checks that `recipes` and `conf` are importable and belong to this checkout.

The two folders are at the top of the repository, and an editable install maps them into the package. Without such an
install they are missing. If another checkout is installed, that checkout's `recipes` and `conf` are imported instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn


if TYPE_CHECKING:
    from pathlib import Path

#: The modules that an editable install maps into the package.
_PARTS = ("nemo_upcycle.recipes", "nemo_upcycle.conf")


def explain_missing_parts() -> None:
    """Make `import nemo_upcycle.recipes` explain how to install the checkout if it is not installed.

    If the package is installed, no finder is added. Python asks the added finder last.
    """
    if find_spec(_PARTS[0]) is None:
        sys.meta_path.append(_MissingParts())


class _MissingParts:
    """Finder for the parts that no other finder finds. Loading such a part raises an error with the fix."""

    # No abstract base class, because importing importlib.abc takes longer than everything else here.
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, self) if fullname in _PARTS else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> NoReturn:
        from nemo_upcycle.errors import CheckoutError

        root = _root()
        raise CheckoutError(
            spec.name,
            kind="missing",
            got=f"is in the checkout {root}, which is not installed",
            fix=f"run: pip install -e {root}",
        )

    def exec_module(self, module: ModuleType) -> None:
        """Satisfy the loader protocol; Python never gets here, because `create_module` raises."""


def require_one_checkout() -> None:
    """Check that `recipes` and `conf` come from this checkout.

    Commands call this function when they start.

    Raises:
        CheckoutError: an editable install maps `recipes` or `conf` of another checkout into this package.
    """
    from nemo_upcycle.errors import CheckoutError

    root = _root()
    for name in _PARTS:
        spec = find_spec(name)
        for place in (spec and spec.submodule_search_locations) or ():
            if not (found := _resolved(place)).is_relative_to(root):
                raise CheckoutError(
                    name,
                    kind="state",
                    got=f"comes from {found}, which is not in the checkout {root}",
                    fix=f"run `make venv` in {root} and use its .venv, or pip install -e {root}",
                )


def _root() -> Path:
    return _resolved(__file__).parents[2]


def _resolved(path: str) -> Path:
    from pathlib import Path  # an import at the top slows down every import of the package

    return Path(path).resolve()
