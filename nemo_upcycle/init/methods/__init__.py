"""The init methods: what becomes of each expert's copy of the dense network. One file a method.

Every module in this folder is imported, so a new method is a new file here. A method of another package registers
itself when its module is imported. None of them imports torch at the top: the planner only wants the names.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, ClassVar, TypeVar

from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import INIT_METHODS, UpcycleSpec


if TYPE_CHECKING:
    from nemo_upcycle.init.experts import ExpertMatrix


class Method:
    """What a method does to an expert's matrices, and what is said of it. Biases and shared experts are never changed.

    Example:
        >>> @register  # doctest: +SKIP
        ... class Negate(Method):
        ...     name, summary = "negate", "copies with the opposite sign"
        ...
        ...     def inexact_because(self, spec):
        ...         return "every weight has the opposite sign"
        ...
        ...     def change(self, spec, matrix):
        ...         matrix.local_FD.neg_()
    """

    #: what `UpcycleSpec.method` calls it, and half a line for the command's help
    name: ClassVar[str]
    summary: ClassVar[str]
    #: the field of the spec that says how much, called after the method; empty for a method that has none
    strength: ClassVar[str] = ""
    #: whether it changes the copies at all
    computes: ClassVar[bool] = True

    def inexact_because(self, spec: UpcycleSpec) -> str:
        """Return why the upcycled model does not compute the dense function; empty if it does."""
        return ""

    def made_by(self, spec: UpcycleSpec) -> str:
        """Say, for the receipt, how a parameter was changed."""
        kind = self.strength.rpartition("_")[2]  # std or ratio
        strength = f"{kind} {getattr(spec, self.strength)}, " if kind else ""
        return f"{self.name} ({strength}seed {spec.seed})"

    def change(self, spec: UpcycleSpec, matrix: ExpertMatrix) -> None:
        """Change one matrix of one expert, in place, as far as it is on this rank; by default not at all.

        The result may depend on seed, layer, expert and neuron, and on the whole matrix, but not on which neurons are
        here: every layout must give the same bits. `matrix.whole_FD` has to be called before anything is changed.
        """


METHODS: dict[str, Method] = {}

_MethodType = TypeVar("_MethodType", bound=type[Method])


def register(method: _MethodType) -> _MethodType:
    """Make a method known by its name: a decorator of its class.

    Raises:
        SpecError: the name is taken.
    """
    if method.name in METHODS:
        raise SpecError(
            "init method", got=f"a second '{method.name}'", expected="a name of its own", fix="choose another name"
        )
    METHODS[method.name] = made = method()
    INIT_METHODS[method.name] = made.inexact_because
    return method


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
