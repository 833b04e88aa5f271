"""The model families: one file a Hugging Face class, and one line here that registers it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.families.base import Family, MoeFamily


if TYPE_CHECKING:
    from nemo_upcycle.models.architecture import Architecture

#: Modules of this package, each with its `FAMILY`. Of the targets that can hold a model, the first is taken.
_MODULES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "mixtral",
    "qwen3_moe",
    "glm4_moe",
    "qwen2_moe",
)
_FAMILIES: dict[str, Family] = {}
__all__ = [
    "Family",
    "MoeFamily",
    "find_family",
    "find_nemo_module",
    "parents",
    "register",
    "require_class",
    "server_caveats",
    "target_class",
    "targets",
]


def register(family: Family) -> None:
    """Let the package know a family: of an own file, or of another package.

    Args:
        family: a parent (`Family`) or a target (`MoeFamily`); it replaces one of the same Hugging Face class.

    Example:
        >>> register(replace(llama.FAMILY, title="Mine", hf_class="MineForCausalLM"))  # doctest: +SKIP
    """
    _FAMILIES[family.hf_class] = family


for _module in _MODULES:
    register(import_module(f"{__name__}.{_module}").FAMILY)


def find_family(hf_class: str) -> Family | None:
    """Return the family of a Hugging Face class; None for a class that is not known, and for none ("")."""
    return _FAMILIES.get(hf_class)


def find_nemo_module(name: str) -> Family | None:
    """Return the first family that NeMo keeps in a module of this name; None if it is not known."""
    return next((family for family in _FAMILIES.values() if name and family.nemo_module == name), None)


def parents() -> list[Family]:
    """Return the families of dense models."""
    return [family for family in _FAMILIES.values() if not isinstance(family, MoeFamily)]


def targets() -> list[MoeFamily]:
    """Return the families of MoE models."""
    return [family for family in _FAMILIES.values() if isinstance(family, MoeFamily)]


def target_class(moe_arch: Architecture) -> str:
    """Return the first Hugging Face class that can hold an MoE model; "" if none can."""
    return next((family.hf_class for family in targets() if not any(family.unsupported(moe_arch))), "")


def require_class(moe_arch: Architecture) -> None:
    """Check that a Hugging Face class can hold a model.

    Raises:
        SpecError: none can; the text says why.
    """
    if moe_arch.hf_class:
        return
    titles: dict[str, list[str]] = {}
    for family in targets():
        titles.setdefault(next(family.unsupported(moe_arch)), []).append(family.title)
    fix = "keep the model in NeMo: it trains and evaluates there"
    if moe_arch.window:
        fix += ", or set sliding_window to null in config.json if training sequences were no longer"
    if sigmoid := [family.title for family in targets() if list(family.unsupported(moe_arch)) == ["softmax scores"]]:
        fix += f", or route by router_score='sigmoid' with router_order='topk_softmax', as {sigmoid[0]} does"
    raise SpecError(
        "Hugging Face class for this MoE",
        got="; ".join(f"{reason} ({', '.join(names)})" for reason, names in titles.items()),
        expected=f"what {' or '.join(family.title for family in targets())} can hold",
        fix=fix,
    )


def server_caveats(moe_arch: Architecture) -> tuple[str, ...]:
    """Return which servers are known not to serve a folder of this model as it is, and why."""
    family = find_family(moe_arch.hf_class)
    return tuple(family.caveats(moe_arch)) if isinstance(family, MoeFamily) else ()
