"""The routers: kinds, which say score and order, and initialisations of their weights. One file each.

Every module in this folder is imported, so a new kind is a new file here. A kind of another package registers itself
when its module is imported. None of them imports torch at the top: the planner only wants the names.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import ROUTER_INITS, ROUTER_KINDS, ROUTER_ORDERS, ROUTER_SCORES, RouterInit, RouterKind


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.init.calibration import LayerSample
    from nemo_upcycle.spec import UpcycleSpec


__all__ = ["CalibratedInit", "RouterInit", "RouterKind", "register"]

_Type = TypeVar("_Type", bound="type[RouterKind] | type[RouterInit]")


class CalibratedInit(RouterInit):
    """Rows that are made of what enters the MoE, once for each layer, and read from the calibration file."""

    texts = "blend"

    @abstractmethod
    def fit(self, sample: LayerSample) -> torch.Tensor:
        """Return the row of every copy, [C, D] in float64, of any scale; the same bits whatever the machine's threads.

        Args:
            sample: what enters the MoE of the layer.
        """

    def rows(self, spec: UpcycleSpec, layer: int, hidden_size: int, generators: Sequence[Any]) -> torch.Tensor:
        """See `RouterInit.rows`."""
        from nemo_upcycle.init.calibration import calibration_of

        calibration = calibration_of(spec)
        assert calibration is not None
        return calibration.router(layer).double() * spec.router_spread


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
