"""Compare the laws' expectation of a run's upcycled model and its baseline with the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_upcycle.evaluation.heldout import BITS
from nemo_upcycle.planning.advice import DenseParent, RunAdvice, known_parent_tokens, run_shape
from nemo_upcycle.reporting.markdown import section, signed, table
from nemo_upcycle.reporting.run_folder import RunRecord
from nemo_upcycle.utils.console import short_count


def expectation(run: RunRecord, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compute the laws' expectation for a run's numbers, and the measured difference.

    Args:
        run: result of `read_run`.
        results: `training` and `paired` of `collect_results`.

    Returns:
        What `RunAdvice.values` has, and `measured`: the loss of the MoE less that of the baseline in nats a
        token, with its `stderr` and what it is `of`; None without a baseline. None where it is not known what the
        parent was trained on, or where it has experts.
    """
    parent_tokens = known_parent_tokens(run.dense, run.trained_on)
    if parent_tokens is None or run.receipt.get("parent_experts"):  # no law is published for such a parent
        return None
    spec, training = run.receipt["spec"], results["training"]
    tokens = training["pretrain"]["tokens"]
    dense_tokens = training["dense_ct"]["tokens"] if "dense_ct" in training else tokens
    numbers = spec["num_experts"], spec["top_k"], spec.get("granularity", 1)
    everywhere = spec.get("moe_layers", "all") == "all"
    shape = run_shape(*numbers, shares=bool(spec.get("shared_experts")), everywhere=everywhere)
    advice = RunAdvice(DenseParent(parent_tokens, run.receipt["dense_params"]), shape, tokens, dense_tokens)
    return advice.values() | {"measured": _measured(run, results)}


def _measured(run: RunRecord, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the difference on held-out text, bits per byte turned into nats a token; else on validation text."""
    paired, counts = results["paired"].get("trained_minus_dense_ct", {}).get(BITS), run.heldout
    if paired and counts and counts.get("tokens") and counts.get("bytes"):
        nats = math.log(2) * counts["bytes"] / counts["tokens"]
        stderr = None if paired["stderr"] is None else nats * paired["stderr"]
        return {"difference": nats * paired["difference"], "stderr": stderr, "of": "held-out text"}
    losses = [results["training"].get(stage, {}).get("last_validation_loss") for stage in ("pretrain", "dense_ct")]
    if None in losses:
        return None
    return {"difference": losses[0] - losses[1], "stderr": None, "of": "the last validation"}


def expectation_section(results: Mapping[str, Any]) -> str:
    """Return expectation and outcome beside one another; nothing where no law was asked."""
    found = results["expectation"]
    if not found:
        return ""
    measured = found["measured"]
    rows = [["measured: not, for the chain trained no baseline", "-", "-"]]
    if measured:
        rows = [[f"measured on {measured['of']}", signed(measured["difference"], measured["stderr"]), "-"]]
    rows += [[f"{name} law ({law['source']})", *_expected(law, measured)] for name, law in found["laws"].items()]
    if not any(name == "fitted" for name in found["laws"]):
        rows.append(["fitted law", "-", f"none for {found['shape']}"])
    tokens = f"{short_count(found['parent_tokens'])} + {short_count(found['tokens'])}"
    if found["dense_tokens"] != found["tokens"]:
        tokens += f" (the baseline: {short_count(found['dense_tokens'])})"
    return section(
        "Expectation and outcome",
        table(["loss of the MoE less the baseline's, nats a token", "difference", "outcome"], rows, words=1),
        f"Of {found['shape']} after {tokens} tokens. A fitted law decides only where it stands"
        " near its points: `nemo-upcycle advise` says when.",
    )


def _expected(law: Mapping[str, Any], measured: Mapping[str, Any] | None) -> list[str]:
    """Return the difference that a law expects, and how that which was measured lies to it."""
    value, band = law["loss_difference"], law["band_90"]
    if value is None:
        return ["-", "its models have another size"]
    shown = signed(value, None) + (f" (90 % {band[0]:+.3f} to {band[1]:+.3f})" if band else "")
    if not law["near"] or law["above_parent"]:
        return [shown, "too far out to count"]
    if measured is None:
        return [shown, "-"]
    if band:
        holds = band[0] <= measured["difference"] <= band[1]
        return [shown, "its band holds what was measured" if holds else "its band does not hold what was measured"]
    same = (value > 0) == (measured["difference"] > 0)
    return [shown, f"the {'same' if same else 'other'} sign was measured; it has no band"]
