"""Advice for a run: what the laws expect of its upcycled model beside its parent trained on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.advice import DenseParent, Expectation, expectation_values
from nemo_upcycle.planning.hardware import read_data
from nemo_upcycle.planning.law import Law, fitted_law, published_law, shape_name
from nemo_upcycle.utils.console import short_count
from nemo_upcycle.utils.validation import number_of_tokens


@dataclass(frozen=True)
class Training:
    """A training that a law is asked about, as `advice.Candidate` has it."""

    name: str
    key: str
    tokens: float
    fits: bool = True


@dataclass(frozen=True)
class RunAdvice:
    """What the laws say of the numbers of a run.

    Args:
        parent: the dense model.
        shape: of the upcycled one: `e8t2`.
        tokens: that it is trained on.
        dense_tokens: that the dense baseline is trained on; without a baseline as many.
    """

    parent: DenseParent
    shape: str
    tokens: float
    dense_tokens: float

    @property
    def trainings(self) -> tuple[Training, Training]:
        """The parent trained on, and the upcycled model."""
        upcycled = Training(f"upcycle {self.shape}", f"upcycled_{self.shape}", self.tokens)
        return Training("dense", "dense", self.dense_tokens), upcycled

    def expect(self, law: Law) -> Expectation | None:
        """Return what a law expects of the upcycled model; None where it has none of its shape."""
        dense, upcycled = self.trainings
        return self.parent.expect(law, upcycled, dense)

    @property
    def by_fitted(self) -> str:
        """What the fitted law says, in words."""
        law = fitted_law()
        if law is None:
            return "no fitted law applies (none was fitted yet)"
        expected = self.expect(law)
        if expected is None:
            return f"no fitted law applies (it has no {self.shape})"
        verdict = self.parent.decide(law, self.trainings)
        if verdict.best:
            return f"{verdict.best}, by the fitted law: {difference_text(expected)}"
        what = "not resolved by the fitted law" if expected.is_near else "no fitted law applies"
        return f"{what} ({verdict.why})"

    @property
    def by_published(self) -> str:
        """What the published law says, in words; empty where it has no such shape."""
        expected = self.expect(published_law())
        if expected is None:
            return ""
        if expected.above_parent:
            return "; the published one does not hold so far out"
        return f"; the published one, which never decides: {difference_text(expected)}"

    def values(self) -> dict[str, Any]:
        """Return what every law says, for machines."""
        laws = {"published": published_law(), "fitted": fitted_law()}
        known = {name: (law, self.expect(law)) for name, law in laws.items() if law}
        return {
            "parent_tokens": self.parent.tokens,
            "parameters": self.parent.parameters,
            "shape": self.shape,
            "tokens": self.tokens,
            "dense_tokens": self.dense_tokens,
            "laws": {
                name: {"source": law.source, "decides": bool(self.parent.decide(law, self.trainings).best)}
                | (expectation_values(expected) or {})
                for name, (law, expected) in known.items()
                if expected
            },
        }


def difference_text(expected: Expectation) -> str:
    """Return an expected difference of losses in words."""
    band = expected.difference
    if band is None:
        return "nothing of this size"
    limits = "" if band.low is None else f" (90 % {band.low:+.3f} to {band.high:+.3f})"
    far = "" if expected.is_near else ", too far out"
    return f"{band.value:+.3f} nats a token beside the parent trained on{limits}{far}"


def run_shape(num_experts: int, top_k: int, granularity: int, *, shares: bool, everywhere: bool) -> str:
    """Return the shape of a run's model; with what no law has trained it is one that no law has.

    Args:
        num_experts, top_k, granularity: as `shape_name` takes them.
        shares: whether it has shared experts.
        everywhere: whether every layer has experts.

    Example:
        >>> run_shape(8, 2, 1, shares=False, everywhere=True), run_shape(8, 2, 1, shares=True, everywhere=False)
        ('e8t2', 'e8t2 with shared experts in some layers')
    """
    name = shape_name(num_experts, top_k, granularity)
    return name + " with shared experts" * shares + " in some layers" * (not everywhere)


def known_parent_tokens(address: str, given: str | None, name: str = "trained_on") -> float | None:
    """Return the tokens that a parent was trained on: as a user says, else those of a published one; None: not known.

    Args:
        address: of the parent, as a run has it.
        given: what the user says: 15T, 300B.
        name: of the setting.

    Raises:
        SpecError: it is no number of tokens.

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
    """Return the advice for a run, in a line, with the command that says more.

    Args:
        address: of the dense parent.
        trained_on: tokens that it was trained on, as the user says; None: those of a published parent.
        arch: of the upcycled model; None: it is not known yet.
        tokens: that it is trained on; 0: not known yet.
        dense_tokens: that the dense baseline is trained on; 0: there is none.
        gpus: of the training; None: not known.
        name: the setting that says what the parent was trained on.

    Raises:
        SpecError: `trained_on` is no number of tokens.
    """
    parent_tokens = known_parent_tokens(address, trained_on, name)
    words = ["nemo-upcycle", "advise", "--model", address]
    words += ["--trained-on", short_count(parent_tokens) if parent_tokens else "N"]
    words += ["--tokens", short_count(tokens) if tokens else "N"]
    if arch is None:
        return f"not known before the parent is fetched; ask: {shlex.join([*words, '--gpus', str(gpus or 'N')])}"
    experts, top_k = arch.num_experts or 1, arch.top_k or 1
    granularity = arch.ffn_size // (arch.expert_ffn_size or arch.ffn_size)
    shape = run_shape(
        experts, top_k, granularity, shares=bool(arch.shared_ffn_size), everywhere=arch.moe_pattern is None
    )
    words += ["--experts", str(experts), "--top-k", str(top_k)]
    words += ["--granularity", str(granularity)] if granularity > 1 else []
    command = shlex.join([*words, "--gpus", str(gpus or "N")])
    if not tokens:
        return f"not known: how long it trains; ask: {command}"
    if parent_tokens is None:
        return f"not known: what the parent was trained on; add {name}=15T (its tokens), or ask: {command}"
    parent = DenseParent(parent_tokens, arch.dense.total_params)
    advice = RunAdvice(parent, shape, tokens, dense_tokens or tokens)
    after = f"{short_count(parent_tokens)} + {short_count(tokens)} tokens"
    return f"{advice.shape} after {after}: {advice.by_fitted}{advice.by_published}. Costs and more: {command}"
