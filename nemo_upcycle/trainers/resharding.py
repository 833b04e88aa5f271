"""Let a run resume from optimizer states that were saved under another expert parallelism.

With expert parallelism, Megatron chains two optimizers: one for the experts and one for everything else. Without
expert parallelism, there is only one optimizer. In a fully reshardable checkpoint, moments and master weights are
stored by parameter name and fit both cases. The settings of parameter groups (rates, steps) are stored with the
optimizers that were saved, but Megatron looks for them with the optimizers of the present run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any


#: Field of a parameter group: whether ranks hold different parameters of this group.
_OF_EXPERTS = "is_expert_parallel"
#: Moments and master weights. Everything else in an optimizer's states is settings.
_TENSORS = "param_state"


def load_other_chains() -> None:
    """Let Megatron's chain of optimizers load states that were saved with more or fewer optimizers."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    load = ChainedOptimizer.load_state_dict
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_regrouped(self: Any, states: Any) -> None:
        load(self, regrouped(states, len(self.chained_optimizers)))

    ChainedOptimizer.load_state_dict = load_regrouped


def regrouped(states: Any, count: int) -> Any:
    """Return the states of a chain of optimizers in the form of a chain with another number of optimizers.

    Args:
        states: states from a distributed checkpoint: settings placed as in the saved chain, tensors placed as in the
            present chain.
        count: number of optimizers in the present chain.

    Example:
        >>> group = {"lr": 1e-5, "is_expert_parallel": False}
        >>> states = {"optimizer": {"param_groups": [group]}, 0: {"param_state": "a"}, 1: {"param_state": "b"}}
        >>> made = regrouped(states, 2)
        >>> [made[number]["param_state"] for number in made]
        ['a', 'b']
        >>> made[1]["optimizer"]["param_groups"] == [group | {"is_expert_parallel": True}, group]
        True
    """
    saved = list(_optimizers(states)) if isinstance(states, Mapping) else []
    if len(saved) in (0, count):
        return states
    groups = [group for one in saved for group in one["optimizer"]["param_groups"]]
    others = [group | {_OF_EXPERTS: not group[_OF_EXPERTS]} for group in groups]  # if two are alike, the later wins
    settings = {name: value for name, value in saved[0].items() if name != _TENSORS and not isinstance(name, int)}
    settings["optimizer"] = settings["optimizer"] | {"param_groups": [*others, *groups]}
    if count == 1:
        return settings | {_TENSORS: states[_TENSORS]}
    return {number: settings | {_TENSORS: states[number][_TENSORS]} for number in range(count)}


def _optimizers(states: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """Yield the settings of each optimizer that was saved."""
    parts = [states[number] for number in sorted(name for name in states if isinstance(name, int))]
    for part in (states, *parts):
        if "param_groups" in part.get("optimizer", {}):
            yield part
