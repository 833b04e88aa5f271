"""Compute the numbers of a report once. `results.json` stores the numbers, and `report.md` prints them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from nemo_upcycle.data.suites.local_tasks import LOCAL_TASKS
from nemo_upcycle.evaluation.compare import compare_items, observations
from nemo_upcycle.evaluation.heldout import TASK, by_source, document_sums
from nemo_upcycle.evaluation.paired import paired_difference
from nemo_upcycle.evaluation.statistics import error_of, with_interval
from nemo_upcycle.reporting.router_metrics import ROUTER_METRICS
from nemo_upcycle.reporting.run_folder import Curve, RunRecord


#: Pairs of models to compare; each difference is the second model minus the first.
PAIRS = (("dense_ct", "trained"), ("dense", "trained"), ("dense", "dense_ct"))
#: training stage -> its model
TRAINED = {"pretrain": "trained", "dense_ct": "dense_ct"}
#: A training with fewer steps shows only that the chain works; it says nothing about the models.
FEW_STEPS = 100


def is_trial(steps: int) -> bool:
    """Return whether a training has too few steps for a verdict or a warning.

    Reports, their figures and the page of a running chain all use this function.

    Args:
        steps: completed optimizer steps.
    """
    return steps < FEW_STEPS


def collect_results(run: RunRecord, environment: dict[str, Any]) -> dict[str, Any]:
    """Compute every number of the report.

    Args:
        run: result of `read_run`.
        environment: result of `describe_environment`.

    Returns:
        A dict with these keys:
        `evaluation` (model -> metric -> value, stderr, low, high);
        `step0` (comparison of the parent and the MoE at step 0, item by item);
        `paired` (`B_minus_A` -> metric -> difference, and `is_trial` if the training of A or B is a trial; a group of
        tasks replaces its tasks);
        `sources` (model -> source of held-out text -> bits per byte with its interval);
        `missing` (task -> reason why it is not scored);
        `published` (published scores named in the suite, or None);
        `contamination` (task -> number of items, and how many of them the texts contain; None for a task that was not
        searched for);
        `heldout_overlap` (from the data's manifest, or None);
        `texts` (sources in the data's manifest);
        `samples` (held-out prompts with each model's continuation);
        `training` (stage -> settings, first and last losses, tokens, rates, memory, expert load, routers);
        `receipt` and `online_receipt` (without the list of parameters);
        `evaluation_settings`, `stage_seconds`, `dense`, `trainer`, `command`, `recipe`, `recipes` and `environment`.

    Raises:
        UpcycleError: two models were evaluated on different items.
    """
    evaluations = run.evaluations
    pairs = [(a, b) for a, b in PAIRS if a in evaluations and b in evaluations]
    tests = sum(len(_main_metrics(evaluations[a])) for a, _ in pairs)
    trials = {TRAINED[stage] for stage, curve in run.curves.items() if is_trial(curve.steps[-1]["step"])}
    return {
        "evaluation": {
            name: {
                metric: {"stderr": entry["stderr"]}
                | with_interval(entry["value"], error_of(entry["stderr"], observations(evaluation, metric)))
                for metric, entry in evaluation["metrics"].items()
            }
            for name, evaluation in evaluations.items()
        },
        "step0": compare_items(evaluations["dense"], evaluations["step0"]),
        "paired": {
            f"{b}_minus_{a}": {
                metric: paired_difference(evaluations[a], evaluations[b], metric, tests)
                | {"is_trial": not trials.isdisjoint((a, b))}
                for metric in _main_metrics(evaluations[a])
            }
            for a, b in pairs
        },
        "sources": {
            name: {
                source: found | with_interval(found["value"], error_of(found["stderr"], found["documents"]))
                for source, found in by_source(document_sums(evaluation)).items()
            }
            for name, evaluation in evaluations.items()
            if all("cluster" in item for item in evaluation["items"].get(TASK, [{}]))
        },
        "missing": evaluations["dense"].get("missing", {}),
        "published": next(iter(evaluations.values()))["suite"]["config"].get("published"),
        "contamination": _contamination(run.contamination, evaluations["dense"]["metrics"]),
        "heldout_overlap": run.heldout_overlap,
        "texts": run.texts,
        "samples": _samples(evaluations),
        "training": {
            stage: summarise_curve(curve)
            | {"settings": run.settings[stage]}
            | ({"changes": run.changes[stage]} if stage in run.changes else {})
            | ({"branches": _branches(curve)} if curve.branches else {})
            for stage, curve in run.curves.items()
        },
        "receipt": _receipt(run.receipt),
        "online_receipt": _receipt(run.online_receipt) if run.online_receipt else None,
        "evaluation_settings": {
            name: {key: evaluation[key] for key in ("settings", "versions", "seconds", "model")}
            for name, evaluation in evaluations.items()
        },
        "stage_seconds": run.stage_seconds,
        "recipe": run.recipe,
        "dense": run.dense,
        "trainer": run.trainer,
        "command": run.command,
        "recipes": run.recipes,
        "environment": environment,
    }


def _branches(curve: Curve) -> list[dict[str, Any]]:
    """Describe each branch of a rewound training: its start, and its last step with the loss of this step."""
    parts = curve.earlier | {curve.branches[-1].number: curve}
    lasts = {number: part.steps[-1] for number, part in parts.items()}
    return [
        {"start": branch.describe(), "time": branch.time}
        | {f"last_{key}": lasts.get(branch.number, {}).get(key) for key in ("step", "loss")}
        for branch in curve.branches
    ]


def _main_metrics(evaluation: dict[str, Any]) -> list[str]:
    """Return the metrics of an evaluation, without the metrics of tasks that belong to a group."""
    grouped = {leaf for leaves in evaluation["groups"].values() for leaf in leaves}
    return [metric for metric in evaluation["metrics"] if metric.rpartition("/")[0] not in grouped]


def _contamination(contamination: dict[str, Any] | None, metrics: Iterable[str]) -> dict[str, Any]:
    """Count each task's items: in total, found in the training texts, and still in the training texts.

    The keys are `items`, `removed` and `left`. Only tasks that were searched for have counts.
    """
    if contamination is None:
        return {}
    counted, report = {}, contamination["report"]
    for task in dict.fromkeys(metric.rpartition("/")[0] for metric in metrics):
        plain = re.sub(r"_\d+shot$", "", task)
        name = f"lm-eval/{plain}"
        if plain in LOCAL_TASKS:
            name = "mmlu" if plain.startswith("mmlu") else ""
        if name in contamination.get("without", []):
            counted[task] = {"items": None, "removed": None, "left": None, "left_words": report["words"]}
        elif name in contamination["sets"]:
            items, hit = (contamination["sets"][name][key] for key in ("items", "items_hit"))
            left = report["sets"].get(name, {}).get("items_hit", 0)
            counted[task] = {"items": items, "removed": hit, "left": left, "left_words": report["words"]}
    return counted


def _samples(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the prompts, each with the models' continuations."""
    asked = {name: samples for name, evaluation in evaluations.items() if (samples := evaluation.get("samples"))}
    return [
        {
            **{key: texts[0][key] for key in ("document", "prompt", "goes_on")},
            "continuations": {name: text["continuation"] for name, text in zip(asked, texts, strict=True)},
        }
        for texts in zip(*asked.values(), strict=False)
    ]


def summarise_curve(curve: Curve) -> dict[str, Any]:
    """Summarise a training stage by first, last, extreme and mean values."""
    first, last = curve.steps[0], curve.steps[-1]
    seconds = sum(line["seconds"] for line in curve.steps)
    done_tokens = last["tokens"] - first["tokens"] + first["tokens"] // first["step"]
    summary = {
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": seconds,
        "tokens_per_s": done_tokens / seconds if seconds else None,
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "first_validation_loss": curve.validation[0][1] if curve.validation else None,
        "last_validation_loss": curve.validation[-1][1] if curve.validation else None,
    }
    if curve.validation and not curve.validation[0][0]:
        summary["step0_loss"] = curve.validation[0][1]
    if rates := [line["lr"] for line in curve.steps if line.get("lr") is not None]:
        summary |= {"highest_lr": max(rates), "last_lr": rates[-1]}
    if held := [line for line in curve.steps if "memory_gib" in line]:
        most = max(held, key=lambda line: line["memory_gib"])
        summary |= {key: most[key] for key in ("memory_gib", "memory_share") if key in most}
    if summary["tokens_per_s"] and last.get("tokens_per_s"):  # scale the last step's FLOP/s to the mean speed
        share = summary["tokens_per_s"] / last["tokens_per_s"]
        summary |= {key: _scaled(last[key], share) for key in ("tflops_per_gpu", "mfu") if key in last}
    if loads := [line for line in curve.steps if line.get("expert_load")]:
        summary["expert_load"] = {
            "first": summarise_load(loads[0]["expert_load"]),
            "last": summarise_load(loads[-1]["expert_load"]),
            "worst": _worst(loads),
        }
    if losses := [line["fp8"] for line in curve.steps if line.get("fp8")]:
        summary["fp8"] = {"first": losses[0], "last": losses[-1]}
    if routers := [line["router"] for line in curve.steps if line.get("router")]:
        summary["router"] = {"first": summarise_router(routers[0]), "last": summarise_router(routers[-1])}
    return summary


def _scaled(value: Any, factor: float) -> Any:
    """Multiply a number, or every number of nested dicts."""
    return {key: _scaled(part, factor) for key, part in value.items()} if isinstance(value, dict) else value * factor


def _worst(loads: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the load, step and layer of the busiest expert, and the largest number of dead experts in a step."""
    over, step, layer = max(
        (over, line["step"], layer) for line in loads for layer, over in enumerate(busiest(line["expert_load"]))
    )
    routers = [line["router"]["dead_experts"] for line in loads if "dead_experts" in line.get("router", {})]
    dead = {"dead_experts": max(sum(filter(None, layers)) for layers in routers)} if routers else {}
    return {"max_violation": over - 1, "step": step, "layer": layer} | dead


def busiest(load_LE: list[list[float]]) -> list[float]:
    """Return the load of each layer's busiest expert relative to a balanced load; 0 for a layer without experts.

    Example:
        >>> busiest([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
        [2.0, 0.0]
    """
    return [max(row) * len(row) for row in load_LE]


def summarise_router(router: dict[str, list[float | None]]) -> dict[str, float]:
    """Summarise the router metrics of one step: the mean over the layers, or the sum if `is_sum` is set.

    Args:
        router: entry `router` of a line in `metrics.jsonl`: name -> value of each layer, None for a layer without
            experts.
    """
    known = {name: [value for value in values if value is not None] for name, values in router.items()}
    summed = {name for name, metric in ROUTER_METRICS.items() if metric.is_sum}
    return {name: sum(values) / (1 if name in summed else len(values)) for name, values in known.items() if values}


def summarise_load(load_LE: list[list[float]]) -> dict[str, float]:
    """Summarise the experts' shares of each layer's token slots.

    Args:
        load_LE: shares of the token slots [layers, experts]; a row of zeros is a layer without experts.

    Returns:
        A dict with `balanced` (1/E), `min` and `max` over all layers and experts, and `cv`, the coefficient of
        variation (standard deviation over mean) within a layer, averaged over the layers; 0 is perfect balance.
    """
    import numpy as np

    moe_LE = np.array([row for row in load_LE if any(row)])
    return {
        "balanced": 1 / moe_LE.shape[1],
        "min": float(moe_LE.min()),
        "max": float(moe_LE.max()),
        "cv": float((moe_LE.std(axis=1) / moe_LE.mean(axis=1)).mean()),
    }


def _receipt(receipt: dict[str, Any]) -> dict[str, Any]:
    """Replace a receipt's list of parameters by counts: for each way of making a parameter, and for each dtype."""
    parameters = receipt.get("parameters", [])
    return {
        **{key: value for key, value in receipt.items() if key != "parameters"},
        "parameters_made_by": dict(Counter(entry["made_by"] for entry in parameters)),
        "parameter_dtypes": dict(Counter(entry["dtype"] for entry in parameters)),
    }
