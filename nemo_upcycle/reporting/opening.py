"""The first screen of a report: parent and MoE, the training, the verdict, and the numbers behind the verdict."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.evaluation.heldout import ANSWER_BITS, BITS
from nemo_upcycle.reporting.evaluation_sections import verdict
from nemo_upcycle.reporting.markdown import difference, label, millions, number
from nemo_upcycle.reporting.results import is_trial
from nemo_upcycle.utils.progress import duration
from nemo_upcycle.utils.writers import plain, table


#: The most sensitive metrics of the local suites -> word for the scored text.
_BITS = {BITS: "text", ANSWER_BITS: "answers"}
_TRAINERS = {"nemo": "NeMo", "bridge": "Megatron-Bridge"}
#: A report warns of load imbalance if the busiest expert's load is at least this multiple of a balanced load.
_UNEVEN = 2.0


def opening(results: dict[str, Any]) -> str:
    """Return the summary; its first two paragraphs are also printed after a run."""
    parts = (
        _became(results),
        _verdict(results),
        table(["", "measured", "verdict"], _numbers(results), words=1),
        uneven(results["training"]["pretrain"]),
        "![loss over tokens](loss.png)",
        _about(results),
    )
    return "\n\n".join(filter(None, parts))


def parent_name(address: str) -> str:
    """Return the last part of a model's address.

    Example:
        >>> parent_name("hf:///models/Llama-3-8B/")
        'Llama-3-8B'
    """
    return address.rstrip("/").rpartition("/")[2]


def became(dense: str, receipt: dict[str, Any]) -> str:
    """Describe the parent and the MoE made from it.

    Args:
        dense: address of the parent.
        receipt: receipt of the upcycling.
    """
    spec = receipt["spec"]
    before, total, active = (millions(receipt[f"{name}_params"]) for name in ("dense", "total", "active"))
    moe = f"MoE of {spec['num_experts']} experts, top-{spec['top_k']}: {total}, {active} active per token."
    return f"{parent_name(dense)}, {before} parameters → {moe}"


def _became(results: dict[str, Any]) -> str:
    """Describe the parent, the MoE made from it, and the MoE's training."""
    done = results["training"]["pretrain"]
    settings = done["settings"]
    where = settings.get("card") or ("GPU" if "memory_share" in done else "CPU")
    ranks = f"{settings['ranks']} ranks ({where})" if settings["ranks"] > 1 else f"one rank ({where})"
    by = f" by {_TRAINERS[results['trainer']]}" if results["trainer"] in _TRAINERS else ""
    return plain(
        f"{became(results['dense'], results['receipt'])} Trained{by} for {done['steps']:,} steps on"
        f" {done['tokens']:,} tokens, in {duration(done['seconds'])} on {ranks}."
    )


def _verdict(results: dict[str, Any]) -> str:
    done, metric = results["training"]["pretrain"], _metric(results)
    others = {"dense": "its parent", "dense_ct": "the dense baseline"}
    compared = [
        f"{_compared(paired)} {title} ({difference(paired)})"
        for name, title in others.items()
        if (paired := results["paired"].get(f"trained_minus_{name}", {}).get(metric))
    ]
    if is_trial(done["steps"]):
        equal = ", and the MoE equals its parent at step 0" if results["receipt"].get("within_tolerance") else ""
        return plain(f"The chain works{equal}. {done['steps']:,} steps are too few to measure a benefit.")
    return plain(f"The MoE is {' and '.join(compared)}, by {_name(metric)}.")


def _compared(paired: dict[str, Any]) -> str:
    words = {
        "the MoE is better": "better than",
        "the other is better": "worse than",
        "not judged": "not judged against",
        "": "not judged against",
    }
    return words.get(verdict(paired, "the other", "the MoE"), "not distinguishable from")


def _metric(results: dict[str, Any]) -> str:
    metrics = results["evaluation"]["dense"]
    return next((metric for metric in _BITS if metric in metrics), next(iter(metrics)))


def _label(metric: str) -> str:
    labels = {BITS: "Held-out bits per byte", ANSWER_BITS: "Held-out bits per byte of answers"}
    return labels.get(metric) or label(metric)


def _name(metric: str) -> str:
    return f"bits per byte of held-out {_BITS[metric]}" if metric in _BITS else label(metric)


def _numbers(results: dict[str, Any]) -> list[list[str]]:
    """Return rows of question, measurement and verdict; put the most important first."""
    metric, training = _metric(results), results["training"]
    rows = []
    for name, title in (("dense", "parent"), ("dense_ct", "baseline")):
        paired = results["paired"].get(f"trained_minus_{name}", {}).get(metric)
        if paired and (judged := verdict(paired, f"the {title}", "the MoE")):
            rows.append([f"{_label(metric)}: trained MoE minus {title}", difference(paired), judged])
    return [*rows, _loss(training), _step_zero(results), *load_rows(training), _speed(training)]


def _loss(training: dict[str, Any]) -> list[str]:
    """Compare the MoE's last loss with the losses of the parent and the baseline."""
    done, baseline = training["pretrain"], training.get("dense_ct", {})
    validated = done["last_validation_loss"] is not None
    kind, key = ("validation", "last_validation_loss") if validated else ("training", "last_loss")
    others = {"parent": (baseline or done).get("step0_loss"), "baseline": baseline.get(key)}
    beside = ", ".join(f"{title} {loss:.3f}" for title, loss in others.items() if loss is not None)
    return [f"{kind.capitalize()} loss at the end", f"{done[key]:.3f}", beside or "nothing to compare with"]


def _step_zero(results: dict[str, Any]) -> list[str]:
    receipt, step0 = results["receipt"], results["step0"]
    measured, allowed = receipt.get("max_abs_logit_diff"), receipt.get("tolerance")
    if not receipt["exact"]:
        text = "cannot be exact with this spec"
    elif measured is None:
        text = "logits were not compared"
    else:
        equal = "equal up to rounding" if receipt.get("within_tolerance") else "not equal"
        text = f"{equal} (allowed: {number(allowed, 3)})"
    changed = f"; {step0['changed_answers']} of {step0['questions']} answers changed" if step0["questions"] else ""
    return ["Largest logit difference at step 0: MoE minus parent", number(measured, 3), text + changed]


def load_rows(training: dict[str, Any]) -> list[list[str]]:
    """Return the row of the busiest expert; no row if the expert load is not known."""
    load = training["pretrain"].get("expert_load")
    if not load:
        return []
    last, worst = _times_balance(load)
    judged = "imbalanced; " if last >= _UNEVEN else "balanced; "
    if is_trial(training["pretrain"]["steps"]):
        judged = ""
    where = f"{judged}at most {worst:.2f} (layer {load['worst']['layer']}, step {load['worst']['step']})"
    return [["Load of the busiest expert at the end (1: balanced)", f"{last:.2f}", where]]


def _times_balance(load: dict[str, Any]) -> tuple[float, float]:
    """Return the busiest expert's load relative to a balanced load: at the last step, and the maximum of all steps."""
    return load["last"]["max"] / load["last"]["balanced"], load["worst"]["max_violation"] + 1


def uneven(done: dict[str, Any]) -> str:
    """Warn of load imbalance; return nothing if the load is even enough or unknown, or the training is a trial.

    Args:
        done: summary of a training, with `steps` and, if known, `expert_load`.
    """
    load = done.get("expert_load")
    if not load or is_trial(done["steps"]) or max(_times_balance(load)) < _UNEVEN:
        return ""
    last, worst = _times_balance(load)
    were = "is" if last >= _UNEVEN else "was at times"
    where = f"layer {load['worst']['layer']}, step {load['worst']['step']}"
    costs = (
        " Every rank waits for the rank of the busiest expert, and a capacity factor drops the tokens above it. Raise"
        " the coefficient of the load-balancing loss, or the number of tokens per step."
    )
    dead = load["worst"].get("dead_experts", 0)
    died = f" At worst, {dead:.0f} experts had less than 1 % of a balanced load." if dead else ""
    return (
        f"**Expert load {were} imbalanced.** The busiest expert had {worst:.1f} times a balanced load ({where}),"
        f" and {last:.1f} times at the last step.{died}{costs}"
    )


def _speed(training: dict[str, Any]) -> list[str]:
    """Compare the speed with the planned speed if it is known; otherwise with the baseline's speed."""
    speed = training["pretrain"]["tokens_per_s"]
    planned = (training["pretrain"].get("planned") or {}).get("tokens_per_s")
    others = {"the plan's": planned, "the baseline's": training.get("dense_ct", {}).get("tokens_per_s")}
    ratios = [
        f"{speed / other:.2f} times {title} {number(other)}" for title, other in others.items() if speed and other
    ]
    return ["Training speed (tokens per second)", number(speed), ratios[0] if ratios else "nothing to compare with"]


def _about(results: dict[str, Any]) -> str:
    """Compare the MoE's tokens and compute with the baseline's, and explain how to read the numbers."""
    receipt, training = results["receipt"], results["training"]
    text = ""
    if "dense_ct" in training:
        tokens = [training[stage]["tokens"] for stage in ("pretrain", "dense_ct")]
        same = "the same number of tokens" if tokens[0] == tokens[1] else f"{tokens[0]:,} and {tokens[1]:,} tokens"
        share = receipt["active_params"] / (receipt.get("parent_active_params") or receipt["dense_params"])
        text = (
            "The baseline is the parent, trained on the same data. MoE and baseline saw"
            f" {same}. The MoE uses {share:.2f} times as many parameters per token. "
        )
    return f"{text}± is half of a 95 % interval. All numbers appear again below, with the files that they come from."
