"""The parts of the package that stand at the top of the repository, `recipes` and `conf`: are they here, and ours?

An editable install maps them into the package. Without one they are missing; beside another checkout's they are its.
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

#: The modules that are mapped.
_PARTS = ("nemo_upcycle.recipes", "nemo_upcycle.conf")


def explain_missing_parts() -> None:
    """Let `import nemo_upcycle.recipes` say how to install a checkout that is not installed.

    Python asks this finder last, and only in such a checkout: where the package is installed nothing is added.
    """
    if find_spec(_PARTS[0]) is None:
        sys.meta_path.append(_MissingParts())


class _MissingParts:
    """Finds the parts that no other finder finds; loading one raises the error that explains it."""

    # Of no abstract class: importlib.abc takes longer to import than all the rest.
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
        """Complete the protocol: `create_module` has raised before."""


def require_one_checkout() -> None:
    """Check that the parts are of this checkout; a command calls it as it begins.

    Raises:
        CheckoutError: an editable install maps a part of another checkout into this package.
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
                    got=f"comes from {found}, another checkout than {root / 'nemo_upcycle'}",
                    fix=f"run `make venv` in {root} and use its .venv, or pip install -e {root}",
                )


def _root() -> Path:
    return _resolved(__file__).parents[2]


def _resolved(path: str) -> Path:
    from pathlib import Path  # here, since every import of the package would wait for it

    return Path(path).resolve()
