"""Cards, model shapes and recipes that the planner knows by name, read from `conf/planning`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.spec import UpcycleSpec


@dataclass(frozen=True)
class Gpu:
    """A card in its machine; `conf/planning/gpus.yaml` explains the fields."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    hbm_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    per_node: int


@dataclass(frozen=True)
class KnownRecipe:
    """What the planner has to know of a recipe.

    Args:
        name: its own.
        dense: architecture that the run starts from.
        spec: how it is upcycled; None for continued dense training.
        defaults: what a step works on, by the names of the command's options.
        h100: whether it takes the arguments of the H100 recipes, which group the experts' products.
    """

    name: str
    dense: Architecture
    spec: UpcycleSpec | None
    defaults: dict[str, Any]
    h100: bool = True

    @property
    def made(self) -> Architecture:
        """The architecture that is trained."""
        return self.dense.upcycled(self.spec) if self.spec else self.dense


@lru_cache(maxsize=8)
def read_data(name: str) -> Any:
    """Return a file of `conf/planning` as plain values."""
    import yaml

    text = (resources.files("nemo_upcycle.conf") / "planning" / name).read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def gpu_names() -> list[str]:
    """Return the names of the known cards."""
    return list(read_data("gpus.yaml"))


def known_gpu(name: str) -> Gpu:
    """Return a card.

    Raises:
        SpecError: it is not known.
    """
    known = read_data("gpus.yaml")
    if name not in known:
        raise SpecError.unknown("gpu", name, known)
    return Gpu(**known[name])


def known_shape(name: str) -> Architecture:
    """Return the architecture of a model by its name in `models.yaml`."""
    return Architecture(**read_data("models.yaml")["shapes"][name])


def known_recipe(name: str) -> KnownRecipe:
    """Return a recipe.

    Raises:
        SpecError: it is not known.
    """
    known = read_data("models.yaml")["recipes"]
    if name not in known:
        raise SpecError.unknown("recipe", name, known)
    entry: dict[str, Any] = dict(known[name])
    entry["tokens"] = float(entry["tokens"])
    dense, experts, top_k = known_shape(entry.pop("dense")), entry.pop("experts", None), entry.pop("top_k", None)
    spec = UpcycleSpec(num_experts=experts, top_k=top_k) if experts else None
    return KnownRecipe(name, dense, spec, h100=entry.pop("h100", True), defaults=entry)


def recipe_for(dense: Architecture, made: Architecture) -> KnownRecipe | None:
    """Return the recipe that makes a model of a dense one, if there is one: told by all that decides what it computes.

    Example:
        >>> llama = known_shape("llama3_8b")
        >>> recipe_for(llama, llama.upcycled(UpcycleSpec(num_experts=8, top_k=2))).name
        'llama3_8b_e8t2'
    """
    for known in map(known_recipe, read_data("models.yaml")["recipes"]):
        shape = replace(known.dense, max_positions=dense.max_positions)  # which change nothing that a model computes
        if (shape, shape.upcycled(known.spec) if known.spec else shape) == (dense, made):
            return known
    return None
