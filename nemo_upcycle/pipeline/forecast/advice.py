"""Whether upcycling is expected to pay with the numbers of a run: one line of its forecast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.planning.advice import advice_line
from nemo_upcycle.trainers.base import TrainingFacts


def advice_of(
    dense: str, trained_on: str | None, facts: Mapping[str, TrainingFacts | None], *, name: str = "trained_on"
) -> str:
    """Write the advice for a run, in a line.

    Args:
        dense: the address of the dense parent.
        trained_on: the user's number of tokens that the parent was trained on; None takes a published parent's.
        facts: facts of the trainings `pretrain`, which upcycles, and `dense_ct`, as far as there are any; None for a
            training whose facts are not known before the parent is fetched.
        name: name of the setting for `trained_on`.

    Raises:
        SpecError: `trained_on` is no number of tokens.
    """
    pretrain, dense_ct = facts.get("pretrain"), facts.get("dense_ct")
    if (dense_ct and dense_ct.arch.num_experts) or _has_experts(dense):
        return "not known: no law of models whose parent has experts is published"
    return advice_line(
        dense,
        trained_on,
        pretrain.arch if pretrain and pretrain.knows_vocabulary else None,
        _tokens(pretrain),
        _tokens(dense_ct),
        pretrain.layout.gpus if pretrain else None,
        name,
    )


def _has_experts(dense: str) -> bool:
    """Return whether a parent that is a folder on this machine has experts."""
    folder = Path(dense.removeprefix("hf://")).expanduser()
    return (folder / "config.json").is_file() and bool(read_architecture(folder).num_experts)


def _tokens(facts: TrainingFacts | None) -> float:
    """Return the tokens of a training; 0 where they are not known."""
    return float(max(0, facts.steps) * facts.step_tokens) if facts else 0.0
