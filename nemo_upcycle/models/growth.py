"""Grow a parent that already has experts: which expert each new one copies, and when the result is exact.

Each of the parent's E experts gets m copies with the same router row, so all copies of an expert have the same logit l
as the expert in the parent. A token passes through k experts in the parent. The combined weight of the copies depends
on top_k of the new model:

- top_k = m k: top-k takes all copies of the parent's k experts. Softmax after top-k gives each copy exp(l) / (m sum
  over the k of exp(l)). Softmax before top-k gives each copy exp(l) / (m sum over the E of exp(l)). Sigmoid scores are
  divided by m times the sum of the parent's k scores. In each case the m copies add up to the parent's weight. This is
  exact without scaling.
- top_k = k: copies of the best experts take all places, so a token passes through k / m of the parent's experts. This
  is exact only for k = 1, because all copies of the chosen expert are equal. With softmax before top-k, a copy has
  only 1 / m of the parent's weight, and a factor of m on the down projections corrects the weight.
- If some experts have more copies than others, no top_k is exact, because each copy counts in the sums.

Identical experts with identical router rows stay identical during training, so `router_std` makes the rows differ. The
numbers that it adds to the copies of one expert sum to zero, so the combined weight of the copies changes only in
second order.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.init.routers import inexact_in_float32
from nemo_upcycle.spec import INIT_METHODS, ROUTER_INITS, RouterKind, UpcycleSpec


#: Spec field whose value is fixed if the parent has experts -> reason.
_KEPT = {
    "granularity": "the parent's experts are copied whole",
    "shared_experts": "the parent's own shared experts are copied",
    "moe_layers": "as in the parent",
    "router_order": "as in the parent",
    "router_score": "as in the parent",
    "routed_scaling_factor": "as in the parent",
}


class Parent(Protocol):
    """Properties of a parent that this module needs.

    `Architecture` has all of these properties. This module cannot import `Architecture`, because `architecture.py`
    imports this module.
    """

    @property
    def hf_class(self) -> str:
        """Class in transformers."""

    @property
    def num_layers(self) -> int:
        """L."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def num_experts(self) -> int | None:
        """E; None without experts."""

    @property
    def top_k(self) -> int | None:
        """Experts per token."""

    @property
    def moe_pattern(self) -> tuple[bool, ...] | None:
        """Which layers have experts; None for all layers."""

    @property
    def router_kind(self) -> RouterKind:
        """Kind of the routers."""

    @property
    def router_score(self) -> str:
        """Function of the router's logits."""

    @property
    def routed_scaling_factor(self) -> float:
        """Factor on the weights of the chosen experts."""

    @property
    def keeps_network(self) -> bool:
        """Whether the dense network is kept beside the experts, with its own norms."""

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether a layer has experts."""


def _layers(spec: UpcycleSpec, parent: Parent) -> tuple[bool, ...]:
    return spec.moe_pattern(parent.num_layers)


def check_growth(parent: Parent, spec: UpcycleSpec) -> None:
    """Check that a spec can grow a parent with experts.

    Raises:
        SpecError: the number of experts does not fit the parent, or the spec has a value that needs a dense parent.
    """
    if spec.expert_utility:
        source_experts(parent, spec, None)
    elif spec.num_experts % (experts := parent.num_experts or 1) or spec.num_experts <= experts:
        raise SpecError(
            field="num_experts",
            got=spec.num_experts,
            expected=f"a multiple of the parent's {experts} experts, {2 * experts} or more",
            fix=f"set <num_experts>={experts * max(2, round(spec.num_experts / experts))}, or give <expert_utility>",
        )
    kept = growth_spec(parent, spec.num_experts, max(2, spec.top_k))  # some router orders refuse top_k=1
    wrong = [name for name in _KEPT if getattr(spec, name) != getattr(kept, name)]
    if _layers(spec, parent) == _layers(kept, parent):
        wrong = [name for name in wrong if name != "moe_layers"]
    if wrong:
        name, reroutes = wrong[0], {"router_order", "router_score"} & {*wrong}
        changed = [*wrong, "top_k"] if reroutes and spec.top_k == 1 else wrong
        raise SpecError(
            field=name,
            got=getattr(spec, name),
            expected=f"{getattr(kept, name)} ({_KEPT[name]})",
            fix="set " + ", ".join(f"<{one}>={getattr(kept, one)}" for one in changed),
        )
    if spec.needs_calibration:
        drawn = ", ".join(name for name, one in ROUTER_INITS.items() if not one.from_data)
        expected = f"one of {drawn}: only noise can be added to the parent's router"
        raise SpecError(field="router_init", got=spec.router_init, expected=expected, fix="omit <router_init>")


def growth_spec(parent: Parent, num_experts: int, top_k: int | None = None, expert_utility: str = "") -> UpcycleSpec:
    """Return the spec that copies a parent's experts. Fields that must equal the parent's have the parent's values.

    Args:
        parent: architecture of a parent with experts.
        num_experts: number of experts in the model.
        top_k: experts per token in the model; None for the number that makes the model exact.
        expert_utility: utility file, see `UpcycleSpec`.

    Raises:
        SpecError: the parent cannot become such a model.

    Example:
        >>> growth_spec(mixtral, 16).top_k  # doctest: +SKIP
        4
    """
    exact_top_k = (parent.top_k or 1) * max(1, num_experts // (parent.num_experts or 1))
    numbers = ",".join(str(layer) for layer in range(parent.num_layers) if parent.is_moe_layer(layer))
    return UpcycleSpec(
        num_experts=num_experts,
        top_k=top_k or exact_top_k,
        moe_layers="all" if parent.moe_pattern is None else numbers,
        expert_utility=expert_utility,
        router_std=0.0,
        router_order=parent.router_kind.order,
        router_score=parent.router_score,
        routed_scaling_factor=parent.routed_scaling_factor,
    )


def refuse_utility(spec: UpcycleSpec) -> None:
    """Refuse utilities of experts if the parent is dense.

    Raises:
        SpecError: the spec names a utility file.
    """
    if spec.expert_utility:
        raise SpecError(
            field="expert_utility",
            kind="refused",
            got="needs a parent with experts, and this one is dense",
            fix="omit <expert_utility>",
        )


def source_experts(parent: Parent, spec: UpcycleSpec | None, layer: int | None) -> tuple[int, ...]:
    """Return which of the parent's experts each expert of a layer copies.

    The first copies of all E experts come first, then the second copies, and so on. With expert parallelism, the
    copies of one expert can therefore be on several ranks.

    Args:
        parent: architecture of a parent with experts.
        spec: spec of the model; None for the parent itself.
        layer: number of the layer in the whole model; None for the first layer with experts.

    Raises:
        SpecError: the utilities do not fit the parent.

    Example:
        >>> source_experts(mixtral, UpcycleSpec(num_experts=16), 0)  # doctest: +SKIP
        (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7)
    """
    experts = parent.num_experts or 1
    if spec is None or not spec.expert_utility:
        return tuple(expert % experts for expert in range(spec.num_experts if spec else experts))
    moe_layers = tuple(number for number in range(parent.num_layers) if parent.is_moe_layer(number))
    path = Path(spec.expert_utility).expanduser()
    state = path.stat() if path.is_file() else None
    rows = _utilities(path, (state.st_mtime_ns, state.st_size) if state else None, experts, len(moe_layers))
    if spec.num_experts <= experts:
        expected = f"more than the parent's {experts}"
        raise SpecError(field="num_experts", got=spec.num_experts, expected=expected, fix=f"set it to {2 * experts}")
    place = 0 if layer is None or len(rows) == 1 else moe_layers.index(layer)
    return _dealt(rows[place], spec.num_experts)


@functools.lru_cache(maxsize=512)
def _dealt(utilities: tuple[float, ...], count: int) -> tuple[int, ...]:
    """Give every expert one copy, then give each further copy to the expert with the largest utility per copy."""
    copies = [1] * len(utilities)
    for _ in range(count - len(utilities)):
        ranked = ((utility / copies[one], -copies[one], -one) for one, utility in enumerate(utilities))
        copies[-max(ranked)[2]] += 1
    return tuple(one for turn in range(max(copies)) for one, number in enumerate(copies) if turn < number)


@functools.lru_cache(maxsize=8)
def _utilities(path: Path, state: tuple[int, int] | None, experts: int, layers: int) -> tuple[tuple[float, ...], ...]:
    """Return the utilities of every MoE layer, or one row for all layers.

    The result is cached. If the file changes, `state` changes, so the file is read again.
    """

    def wrong(got: object, fix: str = "correct the file") -> SpecError:
        expected = f"a YAML list with the utility (0 or more) of each of {experts} experts, or {layers} such lists"
        return SpecError(field="expert_utility", kind="state", got=f"{path} {got}", fix=f"{fix}. Give {expected}")

    if state is None:
        raise wrong("does not exist", "check the path")
    try:
        from nemo_upcycle.utils.conf import read_yaml  # `doctor` runs without PyYAML

        found = read_yaml(path)
    except UpcycleError as error:
        raise wrong(str(error.problem).removeprefix(f"{path} "), error.fix) from None
    rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    if len(rows) not in (1, layers):
        raise wrong(f"has {len(rows)} lists")
    for row in rows:
        if not isinstance(row, list) or len(row) != experts:
            if not isinstance(row, list):
                raise wrong(f"is a {type(row).__name__}")
            raise wrong(f"has {len(row)} number{'s' * (len(row) != 1)}")
        if bad := [one for one in row if isinstance(one, bool) or not isinstance(one, int | float) or one < 0]:
            raise wrong(f"has {bad[0]!r}")
        if not math.isfinite(sum(row)):
            raise wrong("has numbers that are not finite")
    return tuple(tuple(map(float, row)) for row in rows)


def _copies(parent: Parent, spec: UpcycleSpec) -> int | None:
    """Return how many copies every expert has; None if some experts have more copies than others."""
    layers: Sequence[int | None] = [None]
    if spec.expert_utility:
        layers = [layer for layer in range(parent.num_layers) if parent.is_moe_layer(layer)]
    numbers = {number for layer in layers for number in Counter(source_experts(parent, spec, layer)).values()}
    return numbers.pop() if len(numbers) == 1 else None


def expert_scale(parent: Parent, spec: UpcycleSpec) -> float:
    """Return the factor on the down projection of every routed expert. It is 1 unless the parent has top_k=1."""
    copies = _copies(parent, spec)
    any_will_do = parent.top_k == 1 and copies is not None and spec.top_k <= copies
    if not (any_will_do and copies and spec.router_kind.pre_softmax and spec.output_scale == "exact"):
        return 1.0
    return copies / spec.top_k


def router_moves(spec: UpcycleSpec) -> bool:
    """Return whether a spec adds anything to the router rows of a parent with experts."""
    return not ROUTER_INITS[spec.router_init].is_zero(spec)


def inexact_because(parent: Parent, spec: UpcycleSpec) -> tuple[str, ...]:
    """Return why a model does not compute its parent's function at step 0; empty if only rounding differs.

    Args:
        parent: architecture of the parent, dense or with experts.
        spec: spec of the model.
    """
    if not parent.num_experts:
        adds = "the norms after the network and after the experts add rms_norm_eps once more"
        own = spec.inexact_because or inexact_in_float32(spec, parent.hidden_size)
        return (*own, adds) if parent.keeps_network else own
    chosen, copies = parent.top_k or 1, _copies(parent, spec)
    reasons: list[str] = []
    if changed := INIT_METHODS[spec.method](spec):
        reasons.append(changed)
    if copies is None:
        reasons.append(
            "expert_utility gives some experts more copies than others, and the router sums over all copies"
        )
    elif spec.top_k != copies * chosen and not (chosen == 1 and spec.top_k <= copies):
        reasons.append(
            f"with {copies} copies of each expert, top_k={spec.top_k} chooses copies of the parent's best"
            f" {spec.top_k / copies:.3g} experts, but the parent uses {chosen}; top_k={copies * chosen} would be exact"
        )
    elif chosen == 1 and spec.router_kind.pre_softmax and spec.output_scale == "none" and spec.top_k != copies:
        reasons.append(f"output_scale=none leaves {spec.top_k / copies:.4g} of the parent's expert")
    if chosen == spec.top_k == 1 and spec.router_score == "sigmoid":
        reasons.append("Megatron does not normalise a single sigmoid score, and the parent's class does")
    if router_moves(spec):
        reasons.append(f"router_std={spec.router_std:.3g} makes the router score copies of an expert differently")
    return tuple(reasons)


def needs_float32_routing(parent: Parent, spec: UpcycleSpec) -> bool:
    """Return whether a model needs router logits in float32 or more to compute its parent's function.

    For a dense parent see `UpcycleSpec.needs_float32_routing`. Copies of one of the parent's experts have the same
    logit. If the logits of two experts are equal in 16 bits, top-k takes copies of both instead of all copies of one.

    Args:
        parent: architecture of the parent, dense or with experts.
        spec: spec of the model.
    """
    if not parent.num_experts:
        return spec.needs_float32_routing
    return 1 < spec.top_k < spec.num_experts and not inexact_because(parent, spec)


def require_one(parents: Sequence[Parent]) -> None:
    """Check that a parent with experts is the only parent.

    Raises:
        CheckpointError: there are other parents beside a parent with experts.
    """
    if len(parents) > 1 and (one := next((arch for arch in parents if arch.num_experts), None)):
        raise CheckpointError(
            "Several parents",
            kind="refused",
            got=f"cannot be mixed if one has experts ({one.hf_class})",
            fix="give only that parent, or only dense parents",
        )


def router_dtype(spec: UpcycleSpec | None) -> dict[str, str]:
    """Return Megatron's setting for float32 router logits if a spec needs them.

    In bfloat16 the logits of two copies can be equal, and top-k then mixes the copies.
    """
    return {"moe_router_dtype": "fp32"} if spec and spec.needs_float32_routing else {}
