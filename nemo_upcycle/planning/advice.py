"""Advise whether to upcycle a dense model: the cost of each option, and the fitted law's forecast inside its range."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.hardware import read_data
from nemo_upcycle.planning.law import Band, Law, fitted_law, shape_name
from nemo_upcycle.planning.search import Plan, PlanRequest, search
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.console import short_count
from nemo_upcycle.utils.validation import number_of_tokens


#: Up to this ratio beyond the fitted range, of tokens or of parameters, a law decides. A choice: parents that are left
#: out of a fit lie up to a factor 2 beyond the others, and a fit to one model has no term for its size.
MOST_BEYOND = 2.0


class TrainingBudget(NamedTuple):
    """Something to do with a dense model.

    Args:
        name: name of the option in a table.
        key: name of the option in a `Law`.
        tokens: tokens that are trained on.
        fits: whether the GPUs hold it.
    """

    name: str
    key: str
    tokens: float
    fits: bool = True


class Option(NamedTuple):
    """A training, and the fastest layout that fits it, with the training's tokens."""

    training: TrainingBudget
    plan: Plan


class Expectation(NamedTuple):
    """A law's forecast for a training.

    Args:
        difference: its loss less that of going on dense, in nats a token. None: the law's models have another size.
        beyond: ratios to the fitted range, by what is beyond it; 1 is inside.
        above_parent: whether an upcycled model lies above its own parent, where its training begins: there the law
            does not hold.
    """

    difference: Band | None
    beyond: dict[str, float]
    above_parent: bool

    @property
    def is_near(self) -> bool:
        """Whether the law may decide here."""
        return max(self.beyond.values()) <= MOST_BEYOND

    def values(self) -> dict[str, Any]:
        """List it for machines."""
        band = self.difference
        limits = [limit for limit in (band.low, band.high) if limit is not None] if band else []
        return {
            "loss_difference": None if band is None else round(band.value, 5),
            "band_90": [round(limit, 5) for limit in limits] or None,
            "near": self.is_near,
            "beyond": {what: round(ratio, 3) for what, ratio in self.beyond.items()},
            "above_parent": self.above_parent,
        }


class DenseParent(NamedTuple):
    """The dense model that a law is asked about.

    Args:
        tokens: tokens that it was trained on.
        parameters: all of its parameters.
    """

    tokens: float
    parameters: float

    def expect(self, law: Law, one: TrainingBudget, dense: TrainingBudget) -> Expectation | None:
        """Ask a law about a training; None if the law has no such shape, or the GPUs cannot hold it."""
        if not (one.key in law.options and one.fits and dense.fits):
            return None
        beyond = law.options[one.key].beyond(self.tokens, one.tokens, self.parameters)
        if beyond["parameters"] > MOST_BEYOND:
            return Expectation(None, beyond, above_parent=False)
        above = False
        if one.key.startswith("upcycled") and "dense_from_nothing" in law.options and max(beyond.values()) > 1:
            above = law.loss(one.key, self.tokens, one.tokens) > law.loss("dense_from_nothing", 0, self.tokens)
        return Expectation(law.difference(one.key, one.tokens, "dense", dense.tokens, self.tokens), beyond, above)

    def decide(self, law: Law, trainings: Sequence[TrainingBudget]) -> tuple[str | None, str]:
        """Name the best training, or None if the law does not decide, and the reason; the first training is dense."""
        known = {one.name: (one, self.expect(law, one, trainings[0])) for one in trainings}
        expected = {name: (one, found) for name, (one, found) in known.items() if found}
        if not any(one.key.startswith("upcycled") for one, _ in expected.values()):
            return None, "it has no upcycled model of this shape that fits"
        if broken := [name for name, (_, found) in expected.items() if found.above_parent]:
            why = f"it has '{broken[0]}' above the parent that its training begins from: it does not hold so far out"
            return None, why
        main = [found for one, found in expected.values() if "from_nothing" not in one.key]
        ratio, what = max((ratio, what) for found in main for what, ratio in found.beyond.items())
        if ratio > MOST_BEYOND:
            times = f"{ratio:,.1f}" if ratio < 100 else f"{ratio:,.0f}"
            return None, f"the {what} are {times} times beyond its range; it decides up to {MOST_BEYOND:g} times"
        near = {name: one for name, (one, found) in expected.items() if found.is_near}
        losses = {name: band.value for name in near if (band := expected[name][1].difference)}
        best = min(losses, key=lambda name: losses[name])
        for name, one in near.items():
            band = law.difference(near[best].key, near[best].tokens, one.key, one.tokens, self.tokens)
            if name != best and not band.is_resolved:
                return None, f"the bands of '{best}' and '{name}' overlap"
        left_out = "".join(f"; '{name}' lies too far out to count" for name in expected if name not in near)
        return best, f"the band of '{best}' is apart from all others{left_out}"


def options(request: PlanRequest, spec: UpcycleSpec, hours: float | None = None) -> list[Option]:
    """Plan to go on dense, to upcycle, and an MoE from nothing, which trains as fast.

    Args:
        request: the dense model's; its tokens count where `hours` is None.
        spec: spec of the upcycling.
        hours: hours of the GPUs for each option; None: all train on the same tokens.

    Raises:
        SpecError: no layout obeys the rules, or the spec does not fit the model.
    """
    plans = []
    for arch in (request.arch, request.arch.upcycled(spec)):
        plan = search(replace(request, arch=arch), 1)[0]
        if hours is not None:
            tokens = plan.tokens_per_s_per_gpu * request.gpus * 3600 * hours
            plan = replace(plan, request=replace(plan.request, tokens=tokens))
        plans.append(plan)
    dense, moe = plans
    shape = shape_name(spec.num_experts, spec.top_k, spec.granularity)
    named = [("dense", "dense", dense), (f"upcycle {shape}", f"upcycled_{shape}", moe)]
    named.append((f"new {shape}", f"moe_from_nothing_{shape}", moe))
    return [
        Option(TrainingBudget(name, key, plan.request.tokens, plan.verdict != "no"), plan) for name, key, plan in named
    ]


def nearest_outcomes(parent: DenseParent) -> list[dict[str, Any]]:
    """List published results, the nearest first, with `distance`: ratios to the parent's tokens and parameters.

    What was not measured of one parent, whose tokens are null in the file, has none and comes last.
    """
    sizes, found = {"parent_tokens": parent.tokens, "parameters": parent.parameters}, []
    for outcome in read_data("upcycling_points.yaml")["outcomes"]:
        distance = {name: outcome[name] / own for name, own in sizes.items() if outcome["parent_tokens"]}
        farthest = max((max(ratio, 1 / ratio) for ratio in distance.values()), default=math.inf)
        found.append((farthest, outcome | {"distance": {name: float(f"{r:.4g}") for name, r in distance.items()}}))
    return [outcome for _, outcome in sorted(found, key=lambda pair: pair[0])]


def _verdict_of_law(parent: DenseParent, shape: str, tokens: float, dense_tokens: float) -> str:
    """Describe the fitted law's decision for the numbers of a run, or why it does not decide.

    Args:
        parent: the dense model.
        shape: the upcycled model's shape: `e8t2`.
        tokens: tokens that it is trained on.
        dense_tokens: tokens that the dense baseline is trained on; without a baseline as many.
    """
    if (law := fitted_law()) is None:
        return "no fitted law applies (none was fitted yet)"
    dense, upcycled = (
        TrainingBudget("dense", "dense", dense_tokens),
        TrainingBudget(f"upcycle {shape}", f"upcycled_{shape}", tokens),
    )
    expected = parent.expect(law, upcycled, dense)
    if expected is None:
        return f"no fitted law applies (it has no {shape})"
    best, why = parent.decide(law, (dense, upcycled))
    if best and (band := expected.difference):
        limits = "" if band.low is None else f" (90 % {band.low:+.3f} to {band.high:+.3f})"
        return f"{best}, by the fitted law: {band.value:+.3f} nats a token beside the parent trained on{limits}"
    return f"{'not resolved by the fitted law' if expected.is_near else 'no fitted law applies'} ({why})"


def known_parent_tokens(address: str, given: str | None, name: str = "trained_on") -> float | None:
    """Find the tokens that a parent was trained on: the user's number, or a published parent's; None: not known.

    Args:
        address: the parent's, as a run has it.
        given: the user's text, such as 15T or 300B.
        name: the setting's name.

    Raises:
        SpecError: `given` is no number of tokens.

    Example:
        >>> known_parent_tokens("asset://smollm2-135m", None), known_parent_tokens("/models/mine", "300B")
        (2000000000000.0, 300000000000.0)
    """
    if given:
        return number_of_tokens(str(given), name)
    known: Mapping[str, Any] = read_data("parents.yaml").get(address, {})
    return known.get("tokens")


def advice_line(
    address: str,
    trained_on: str | None,
    arch: Architecture | None,
    tokens: float,
    dense_tokens: float,
    gpus: int | None,
    name: str = "trained_on",
) -> str:
    """Write the advice for a run, in a line, with the command that says more.

    Args:
        address: the dense parent's.
        trained_on: the parent's tokens, as the user says; None: those of a published parent.
        arch: the upcycled model's; None: it is not known yet.
        tokens: tokens that it is trained on; 0: not known yet.
        dense_tokens: tokens of the dense baseline; 0: there is none.
        gpus: the training's; None: not known.
        name: the setting that says what the parent was trained on.

    Raises:
        SpecError: `trained_on` is no number of tokens.
    """
    parent_tokens = known_parent_tokens(address, trained_on, name)
    words = ["nemo-upcycle", "advise", "--model", address]
    words += ["--trained-on", short_count(parent_tokens) if parent_tokens else "N"]
    words += ["--tokens", short_count(tokens) if tokens else "N"]
    if arch is None:
        return f"not known before the parent is fetched; ask: `{shlex.join([*words, '--gpus', str(gpus or 'N')])}`"
    experts, top_k = arch.num_experts or 1, arch.top_k or 1
    granularity = arch.ffn_size // (arch.expert_ffn_size or arch.ffn_size)
    shape = shape_name(experts, top_k, granularity)
    # A model with parts that no law has seen gets a name that none has.
    shape += " with shared experts" * bool(arch.shared_ffn_size) + " in some layers" * (arch.moe_pattern is not None)
    words += ["--experts", str(experts), "--top-k", str(top_k)]
    words += ["--granularity", str(granularity)] if granularity > 1 else []
    command = shlex.join([*words, "--gpus", str(gpus or "N")])
    if not tokens:
        return f"not known: how long it trains; ask: `{command}`"
    if parent_tokens is None:
        return f"not known: what the parent was trained on; add {name}=15T (its tokens), or ask: `{command}`"
    parent = DenseParent(parent_tokens, arch.dense.total_params)
    decided = _verdict_of_law(parent, shape, tokens, dense_tokens or tokens)
    after = f"{short_count(parent_tokens)} + {short_count(tokens)} tokens"
    return f"{shape} after {after}: {decided}. Costs and more: `{command}`"
