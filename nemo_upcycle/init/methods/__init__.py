"""Init methods change the experts' copies of the dense network. Each method is one function in its own file.

Every module in this folder is imported, so a new method is a new file here. A method of another package registers
itself when its module is imported. No method imports torch at the top, because the planner needs only the names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import INIT_METHODS, UpcycleSpec


if TYPE_CHECKING:
    from nemo_upcycle.init.experts import ExpertMatrix

    Change = Callable[[ExpertMatrix, UpcycleSpec], None]


@dataclass(frozen=True)
class Method:
    """An init method, as `init_method` registers it. Biases and shared experts are never changed.

    Args:
        name: the value of `UpcycleSpec.method` that selects the method.
        summary: half a line for the command's help.
        change: function that changes the copies.
        strength: spec field that sets how much the method changes; "" if the method has no such field.
        inexact: reason why the resulting models do not compute the dense function, as a sentence without a subject;
            "" if the models compute this function.
        computes: whether the method changes the copies at all.
    """

    name: str
    summary: str
    change: Change
    strength: str
    inexact: str
    computes: bool

    def inexact_because(self, spec: UpcycleSpec) -> str:
        """Return why the model of a spec does not compute the dense function, or "" if it does."""
        strength = getattr(spec, self.strength) if self.strength else self.name
        return f"{self.strength or 'method'}={strength} {self.inexact}" if self.inexact and strength else ""

    def made_by(self, spec: UpcycleSpec) -> str:
        """Return how the receipt describes a changed parameter."""
        kind = self.strength.rpartition("_")[2]  # std or ratio
        strength = f"{kind} {getattr(spec, self.strength)}, " if kind else ""
        return f"{self.name} ({strength}seed {spec.seed})"


METHODS: dict[str, Method] = {}


def init_method(
    summary: str, *, strength: str = "", inexact: str = "", computes: bool = True
) -> Callable[[Change], Change]:
    """Register a function as an init method under the function's name.

    The function changes `matrix.local_FD` in place: this rank's neurons of one matrix of one expert. Every layout must
    give the same bits, so the result must not depend on which neurons this rank holds. It may depend on seed, layer,
    expert, neuron and the whole matrix. Call `matrix.whole_FD` before you change anything.

    Args:
        summary: half a line for the command's help.
        strength: spec field that sets how much the method changes; "" if the method has no such field.
        inexact: reason why the resulting models do not compute the dense function, as a sentence without a subject;
            "" if the models compute this function.
        computes: whether the method changes the copies at all.

    Raises:
        SpecError: the name is taken.

    Example:
        >>> @init_method("copies with the opposite sign", inexact="changes every sign")  # doctest: +SKIP
        ... def negate(matrix, spec):
        ...     matrix.local_FD.neg_()
    """

    def register(change: Change) -> Change:
        name = change.__name__
        if name in METHODS:
            raise SpecError(f"Init method '{name}'", kind="refused", got="exists already", fix="choose another name")
        METHODS[name] = Method(name, summary, change, strength, inexact, computes)
        INIT_METHODS[name] = METHODS[name].inexact_because
        return change

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
