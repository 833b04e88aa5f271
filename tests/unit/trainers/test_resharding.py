"""The settings of parameter groups are passed to the optimizers of a run, for any number of optimizers."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.trainers.resharding import regrouped


ALL = {"lr": 1e-5, "is_expert_parallel": False}
EXPERTS = {"lr": 3e-5, "is_expert_parallel": True}


def of(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"optimizer": {"param_groups": [*groups]}, **more}


def test_states_of_as_many_optimizers_stay_as_they_are() -> None:
    chain = {0: of(ALL, param_state="a"), 1: of(EXPERTS, param_state="b")}
    for states in (of(ALL, param_state="a"), chain, [of(ALL), of(EXPERTS)]):
        assert regrouped(states, 1 if "optimizer" in states else 2) is states


def test_one_optimizer_gets_the_settings_of_two() -> None:
    """The saved groups come last and take precedence, so experts keep their own settings."""
    states = {"param_state": "all", 0: of(ALL, form="x"), 1: of(EXPERTS, form="x")}
    made = regrouped(states, 1)
    assert (made["param_state"], made["form"], {*made} & {0, 1}) == ("all", "x", set())
    assert made["optimizer"]["param_groups"][2:] == [ALL, EXPERTS]
    assert made["optimizer"]["param_groups"][0] == ALL | {"is_expert_parallel": True}
