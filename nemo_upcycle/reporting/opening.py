"""How report.md opens: one sentence, four numbers with a verdict each, one figure."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.evaluation.heldout import BITS
from nemo_upcycle.reporting.evaluation_sections import signed, verdict
from nemo_upcycle.reporting.figures import chain_only
from nemo_upcycle.reporting.markdown import label, millions, number, plain, table


#: With how many numbers a report opens.
_NUMBERS = 4


def opening(results: dict[str, Any]) -> str:
    """Return what a reader wants to know first; its first paragraph, the headline, is also printed after a run."""
    parts = (
        _headline(results),
        table(["", "measured", "verdict"], _numbers(results)[:_NUMBERS], words=1),
        "![loss over tokens](loss.png)",
        _made(results),
    )
    return "\n\n".join(parts)


def _headline(results: dict[str, Any]) -> str:
    spec, done, metric = results["receipt"]["spec"], results["training"]["pretrain"], _metric(results)
    others = {"dense": "its dense parent", "dense_ct": "the dense baseline"}
    compared = [
        f"{_compared(results['paired'][pair][metric])} {title}"
        for name, title in others.items()
        if (pair := f"trained_minus_{name}") in results["paired"]
    ]
    few = chain_only(done["steps"])
    return plain(
        f"After {done['steps']:,} steps on {done['tokens']:,} tokens the MoE of {spec['num_experts']} experts, top-"
        f"{spec['top_k']}, is {' and '.join(compared)}, by {_name(metric)}.{f' {few}.' if few else ''}"
    )


def _compared(found: dict[str, Any]) -> str:
    words = {
        "the MoE is better": "better than",
        "the other is better": "worse than",
        "not judged": "not judged against",
    }
    return words.get(verdict(found, "the other", "the MoE"), "not distinguishable from")


def _metric(results: dict[str, Any]) -> str:
    metrics = results["evaluation"]["dense"]
    return BITS if BITS in metrics else next(iter(metrics))  # the most sensitive one of the local suites


def _name(metric: str) -> str:
    return "bits per byte of held-out text" if metric == BITS else label(metric)


def _numbers(results: dict[str, Any]) -> list[list[str]]:
    """Return rows of a question, what was measured and a verdict, the most important first."""
    metric, training = _metric(results), results["training"]
    rows = [_step_zero(results)]
    for name, title in (("dense", "the dense parent"), ("dense_ct", "the dense baseline")):
        if found := results["paired"].get(f"trained_minus_{name}", {}).get(metric):
            rows.append([f"trained MoE - {title}: {_name(metric)}", signed(found), verdict(found, title, "the MoE")])
    rows.append(_speed(training))
    if "memory_gib" in (done := training["pretrain"]):
        share = f"{100 * done['memory_share']:.0f} % of its card" if "memory_share" in done else "on a CPU"
        rows.append(["peak memory of a rank", f"{done['memory_gib']:.2f} GiB", share])
    return rows


def _step_zero(results: dict[str, Any]) -> list[str]:
    receipt, found = results["receipt"], results["step0"]
    measured, allowed = receipt.get("max_abs_logit_diff"), receipt.get("tolerance")
    if not receipt["exact"]:
        told = "this specification cannot be exact"
    elif measured is None:
        told = "logits were not compared"
    else:
        equal = "equal up to rounding" if receipt.get("within_tolerance") else "not equal"
        told = f"{equal} (allowed: {number(allowed, 3)})"
    changed = f"; {found['changed_answers']} of {found['questions']} answers changed" if found["questions"] else ""
    return ["MoE at step 0 - the dense parent: largest logit difference", number(measured, 3), told + changed]


def _speed(training: dict[str, Any]) -> list[str]:
    """Compare the speed with the plan's, else with that of the dense baseline."""
    speed = training["pretrain"]["tokens_per_s"]
    planned = (training["pretrain"].get("planned") or {}).get("tokens_per_s")
    others = {"the plan's": planned, "the dense baseline's": training.get("dense_ct", {}).get("tokens_per_s")}
    told = [f"{speed / other:.2f} times {title} {number(other)}" for title, other in others.items() if speed and other]
    return ["tokens per second in training", number(speed), told[0] if told else "nothing to compare with"]


def _made(results: dict[str, Any]) -> str:
    """Return what was made of what, and how the MoE's compute compares with the baseline's."""
    receipt, training = results["receipt"], results["training"]
    text = (
        f"A dense model of {millions(receipt['dense_params'])} parameters became an MoE of"
        f" {millions(receipt['total_params'])}, {millions(receipt['active_params'])} of them active for a token."
    )
    if "dense_ct" in training:
        tokens = [training[stage]["tokens"] for stage in ("pretrain", "dense_ct")]
        same = "equally many tokens" if tokens[0] == tokens[1] else f"{tokens[0]:,} and {tokens[1]:,} tokens"
        share = receipt["active_params"] / receipt["dense_params"]
        text += f" MoE and baseline saw {same}; for each, the MoE computes with {share:.2f} times the parameters."
    return f"{text} Differences are ± their paired standard error. Every number is repeated below, with its file."
