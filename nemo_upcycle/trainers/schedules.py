"""Learning-rate factors of router and experts and the load-balancing coefficient, as functions of the global step.

They have no state: a resumed run has the values of a run that was never stopped. The factors act within a Megatron
optimizer's step only: schedulers see plain learning rates, and no checkpoint holds them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.utils.validation import check_number, check_whole


ROUTER, EXPERTS, REST = "router", "experts", "rest"
SHAPES = ("cosine", "linear")
FREEZES = ("experts", "all")
#: `lr_mult` in the parameter groups of each part. Megatron identifies a checkpoint's groups by this value, so it names
#: the part and is no factor: the factors may change when a run resumes.
MARKS = {REST: 1.0, ROUTER: -1.0, EXPERTS: -2.0}
_PARTS = {mark: part for part, mark in MARKS.items()}


def part_of(name: str) -> str:
    """Return whether a Megatron parameter belongs to a router, to a routed expert or to the rest.

    A shared expert sees every token, as a dense layer does, so it counts as the rest.

    Example:
        >>> part_of("decoder.layers.0.mlp.experts.linear_fc1.weight3")
        'experts'
    """
    found = re.search(r"\.mlp\.(router|experts)\.", name)
    return found.group(1) if found else REST


@dataclass(frozen=True, kw_only=True)
class LearningRateFactors:
    """Factors on the scheduled learning rate, for each part of the model and each step.

    factor(part, step) = 0 while the part is frozen (step < warmup_steps), else the part's multiplier; 1 for the rest.
    With decoupled weight decay (AdamW) an update is lr * (Adam's direction + decay * weight): the factor acts on the
    decay too, and 0 leaves a weight exactly as it is.

    Args:
        router: multiplier of the router's learning rate.
        experts: multiplier of the routed experts' learning rate.
        warmup_steps: optimizer steps at the start in which something is frozen; 0 for none.
        freezes: what is frozen in these steps: `experts`, or `all` but the router.

    Raises:
        SpecError: a value is out of range or unknown.

    Example:
        >>> factors = LearningRateFactors(router=4.0, warmup_steps=100)
        >>> factors.of("router", 0), factors.of("experts", 99), factors.of("experts", 100)
        (4.0, 0.0, 1.0)
    """

    router: float = 1.0
    experts: float = 1.0
    warmup_steps: int = 0
    freezes: str = "experts"

    def __post_init__(self) -> None:
        check_number("router_lr_mult", self.router, 0.0)
        check_number("expert_lr_mult", self.experts, 0.0)
        check_whole("router_warmup_steps", self.warmup_steps, 0)
        if self.freezes not in FREEZES:
            raise SpecError.unknown("router_warmup_freezes", str(self.freezes), FREEZES)

    @property
    def is_neutral(self) -> bool:
        """Whether every factor is 1 at every step."""
        return self.router == self.experts == 1 and self.warmup_steps == 0

    def of(self, part: str, step: int) -> float:
        """Return the factor of a part for the optimizer step that follows `step` finished ones."""
        if step < self.warmup_steps and (part == EXPERTS or (part == REST and self.freezes == "all")):
            return 0.0
        return {ROUTER: self.router, EXPERTS: self.experts, REST: 1.0}[part]


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """A value that goes from `start` to `end` within `steps` steps and stays there.

    With t = min(step / steps, 1): linear is start + (end - start) * t; cosine has (1 - cos(pi t)) / 2 in place of t.

    Args:
        start: value of the first step (step 0).
        end: value from step `steps` on.
        steps: optimizer steps from the one to the other; 0 keeps `start`.
        shape: `cosine` or `linear`.

    Raises:
        SpecError: a value is out of range or unknown, or there is an end without steps.

    Example:
        >>> Anneal(start=0.01, end=0.0, steps=4, shape="linear").at(1)
        0.0075
    """

    start: float
    end: float = 0.0
    steps: int = 0
    shape: str = "cosine"

    def __post_init__(self) -> None:
        check_number("moe_aux_loss_coeff", self.start, 0.0)
        check_number("aux_loss_end", self.end, 0.0)
        check_whole("aux_loss_steps", self.steps, 0)
        if self.shape not in SHAPES:
            raise SpecError.unknown("aux_loss_shape", str(self.shape), SHAPES)
        if self.end and not self.steps:
            raise SpecError(
                field="aux_loss_steps",
                got=0,
                expected=f"1 or more, to reach {self.end}",
                fix="set <aux_loss_steps>=1000, or <aux_loss_end>=0",
            )

    def at(self, step: int) -> float:
        """Return the value for the step that follows `step` finished ones."""
        if not self.steps or step <= 0:
            return self.start
        if step >= self.steps:
            return self.end
        share = step / self.steps
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def schedules_of(
    router_lr_mult: float = 1.0,
    expert_lr_mult: float = 1.0,
    router_warmup_steps: int = 0,
    router_warmup_freezes: str = "experts",
    aux_loss_end: float = 0.0,
    aux_loss_steps: int = 0,
    aux_loss_shape: str = "cosine",
) -> tuple[LearningRateFactors, Anneal]:
    """Turn the settings of `UpcycleOptimizer` into schedules; the coefficient starts at the model's.

    Raises:
        SpecError: a value is out of range or unknown.
    """
    factors = LearningRateFactors(
        router=router_lr_mult, experts=expert_lr_mult, warmup_steps=router_warmup_steps, freezes=router_warmup_freezes
    )
    return factors, Anneal(start=0.0, end=aux_loss_end, steps=aux_loss_steps, shape=aux_loss_shape)


def describe(factors: LearningRateFactors, anneal: Anneal) -> Iterator[str]:
    """Yield a line for each thing that differs from a plain training."""
    if factors.router != 1 or factors.experts != 1:
        yield f"learning rate: router x {factors.router:g}, experts x {factors.experts:g}"
    if factors.warmup_steps:
        frozen = "the experts are" if factors.freezes == "experts" else "everything but the router is"
        yield f"router warm-up: {frozen} frozen in the first {factors.warmup_steps} steps"
    if anneal.steps:
        yield (
            f"load-balancing coefficient: {anneal.start:g} to {anneal.end:g} "
            f"in the first {anneal.steps} steps ({anneal.shape})"
        )


def scale_within_step(optimizer: Any, mark: str, factor: Callable[[str], float]) -> None:
    """Let a Megatron optimizer step with learning rates times their part's factor; outside they are plain.

    Args:
        optimizer: the optimizer; changed in place.
        mark: key of a parameter group under which its mark, one of `MARKS`, stands.
        factor: returns the present factor of a part.

    Raises:
        SpecError: there is no router among its parameters.
    """
    if MARKS[ROUTER] not in {group[mark] for group in optimizer.param_groups}:
        raise SpecError(
            "router of the model",
            got="none",
            expected="one, for learning rates by part",
            fix="leave router_* and expert_lr_mult alone, or train an MoE model",
        )
    step = optimizer.step

    @functools.wraps(step)
    def scaled_step() -> Any:
        scheduled = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, rate in scheduled:
            group["lr"] = rate * factor(_PARTS[group[mark]])
        try:
            return step()
        finally:
            for group, rate in scheduled:
                group["lr"] = rate

    optimizer.step = scaled_step


def annealed_configs(config: Any, chunks: Iterable[torch.nn.Module], setting: str) -> list[Any]:
    """Return the configurations that the routers of this rank ask for their coefficient at every forward pass.

    Args:
        config: configuration of the transformer.
        chunks: chunks of the model on this rank.
        setting: name of the anneal's steps, for the text of errors.

    Raises:
        SpecError: an anneal would not act: there is no auxiliary loss, several, or one frozen into a CUDA graph.
    """
    kind = config.moe_router_load_balancing_type if config.num_moe_experts else "none"
    if kind not in ("aux_loss", "seq_aux_loss", "global_aux_loss"):
        fix = f"set moe_router_load_balancing_type of the model, or {setting}=0"
        raise SpecError(setting, got=f"'{kind}' balancing", expected="a model with one auxiliary loss", fix=fix)
    if kind == "global_aux_loss" and not config.moe_aux_loss_coeff:  # Megatron makes no counters for it
        fix = "start with a small moe_aux_loss_coeff of the model"
        raise SpecError(setting, got="a global loss from 0", expected="a start above 0", fix=fix)
    if config.cuda_graph_impl != "none" and not _graphs_attention_alone(config.cuda_graph_scope):
        fix = "set cuda_graph_scope of the model to attn (or no CUDA graph)"
        raise SpecError(setting, got="routers in a CUDA graph", expected="none: a graph keeps numbers", fix=fix)
    from megatron.core.transformer.moe.router import TopKRouter

    return [module.config for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]


def _graphs_attention_alone(scope: Any) -> bool:
    """Return whether CUDA graphs hold attention only; from Megatron-Core 0.16 on a scope is a list of enumerated."""
    scopes = scope if isinstance(scope, list | tuple) else [scope]
    return {getattr(one, "name", one) for one in scopes} == {"attn"}
