"""Tell a checkout whose recipes or configuration come from another one, before a command mixes both."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def require_one_checkout() -> None:
    """End the program where an editable install maps a folder of another checkout into this package.

    It comes first in every command, and so answers by itself: status 2, and no traceback.
    """
    from nemo_upcycle.errors import UpcycleError

    root = Path(__file__).resolve().parents[2]
    for name in ("recipes", "conf"):
        spec = find_spec(f"nemo_upcycle.{name}")
        for place in (spec and spec.submodule_search_locations) or ():
            if not (found := Path(place).resolve()).is_relative_to(root):
                error = UpcycleError(
                    f"nemo_upcycle.{name}",
                    got=f"{found}, of another checkout than {root / 'nemo_upcycle'}",
                    expected=str(root / name),
                    fix=f"run `make venv` in {root} and use its .venv, or pip install -e {root}",
                )
                sys.stderr.write(f"Error: {error}\n")
                raise SystemExit(error.exit_status)
