"""The routers: kinds, which say score and order, and initialisations of their weights. One file each.

Every module in this folder is imported, so a new kind is a new file here. A kind of another package registers itself
when its module is imported. None of them imports torch at the top: the planner only wants the names.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, TypeVar

from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import ROUTER_INITS, ROUTER_KINDS, ROUTER_ORDERS, ROUTER_SCORES, RouterInit, RouterKind


__all__ = ["RouterInit", "RouterKind", "register"]

_Type = TypeVar("_Type", bound="type[RouterKind] | type[RouterInit]")


def register(type_: _Type) -> _Type:
    """Make a kind known by its score and order, or an initialisation by its name: a decorator of its class.

    Raises:
        SpecError: these are taken.
    """
    made = type_()
    if isinstance(made, RouterInit):
        _add(ROUTER_INITS, made.name, made)
    else:
        _add(ROUTER_KINDS, (made.score, made.order), made)
        for name, names in ((made.score, ROUTER_SCORES), (made.order, ROUTER_ORDERS)):
            names += [] if name in names else [name]
    return type_


def _add(table: dict[Any, Any], key: Any, made: object) -> None:
    if key in table:
        raise SpecError("router", got=f"a second {key}", expected="a name of its own", fix="choose another name")
    table[key] = made


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
