"""The sections of report.md about evaluation: scores, differences, samples, step 0."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from nemo_upcycle.evaluation.backends import NEW_TOKENS
from nemo_upcycle.reporting.markdown import difference, label, mean_with_interval, number, section, sources
from nemo_upcycle.reporting.results import FEW_STEPS, PAIRS, TRAINED, is_trial
from nemo_upcycle.reporting.run_folder import MODELS
from nemo_upcycle.utils.writers import plain, table


def verdict(paired: dict[str, Any], a: str, b: str) -> str:
    """Name the better model if the interval of the difference excludes 0; return nothing for a trial."""
    if paired["is_trial"]:
        return ""
    if paired["identical"]:
        return "equal on every item"
    if paired["stderr"] is None or paired["higher_is_better"] is None:
        return "not judged"
    if not paired["significant"]:
        return "no significant difference"
    return f"{b if (paired['difference'] > 0) == paired['higher_is_better'] else a} is better"


def evaluation(results: dict[str, Any]) -> str:
    """Return the section with the scores of all models and the differences between models."""
    models, metrics = _models(results), next(iter(results["paired"].values()))
    pairs = {f"{b}_minus_{a}": (a, b) for a, b in PAIRS if f"{b}_minus_{a}" in results["paired"]}
    differences = [
        [label(metric), *(_judged(results["paired"][pair][metric], *sides) for pair, sides in pairs.items())]
        for metric in metrics
    ]
    return section(
        "Evaluation",
        _values(results),
        _missing(results["missing"]),
        _sources(results, models),
        "![held-out text over tokens](heldout.png)" if "heldout" in results["figures"] else "",
        "± is half of a 95 % interval. Perplexities and bits per byte: lower is better; accuracies: higher is better.",
        table(["difference", *(f"{MODELS[b]} minus {MODELS[a]}" for a, b in pairs.values())], differences),
        _too_few(results),
        "Both models saw the same items, so the interval of a difference is narrower than the intervals of the values."
        " All intervals of the table hold at once (Bonferroni). A model is called better only if the interval of its"
        " difference excludes 0. Windows of one document count as one observation, and so do questions of one subject."
        " The verdicts are about these trained models. Trainings with other seeds may differ.",
        _contamination(results["contamination"]),
        _beside_published(results, models),
        _evaluation_files(models),
    )


def scores(results: dict[str, Any]) -> str:
    """Return the scores of all models for a model card, and how they were measured."""
    about = results["evaluation_settings"]["trained"]
    limit = about["settings"].get("limit")
    some = f", on the first {limit} items of each task" if limit else ""
    where = " of the checkpoint" if about["settings"].get("backend") == "megatron" else ""
    return (
        f"{_values(results)}\n\n± is half of a 95 % interval, by lm-eval"
        f" {plain(about['versions'].get('lm_eval', ''))} in {plain(about['settings'].get('dtype'))}{where}{some}."
        " Perplexities and bits per byte: lower is better;"
        f" accuracies: higher is better. Trained MoE: {results['training']['pretrain']['steps']:,} steps."
    )


def _models(results: dict[str, Any]) -> dict[str, str]:
    return {name: title for name, title in MODELS.items() if name in results["evaluation"]}


def _values(results: dict[str, Any]) -> str:
    models = _models(results)
    rows = [
        [label(metric), *(mean_with_interval(results["evaluation"][name][metric]) for name in models)]
        for metric in next(iter(results["paired"].values()))
    ]
    return table(["metric", *models.values()], rows)


def _sources(results: dict[str, Any], models: dict[str, str]) -> str:
    """Return a table of bits per byte for each source of held-out text; nothing if there is only one source."""
    by_model = {name: results["sources"][name] for name in models if name in results["sources"]}
    if len(next(iter(by_model.values()), {})) < 2:
        return ""
    rows = [
        [
            f"{source} ({about['documents']} documents)",
            *(mean_with_interval(its[source]) for its in by_model.values()),
        ]
        for source, about in next(iter(by_model.values())).items()
    ]
    return table(["bits per byte, by source", *(models[name] for name in by_model)], rows)


def _missing(tasks: dict[str, str]) -> str:
    """Say which tasks of the suite were not scored, and why."""
    return "\n\n".join(
        f"Not scored: {plain(task)}. Its data are not available: {plain(why)}." for task, why in tasks.items()
    )


def _contamination(tasks: dict[str, Any]) -> str:
    """Return a table of each task's items that were found in the training texts; nothing without a search."""
    if not tasks:
        return ""
    words = next(iter(tasks.values()))["left_words"]
    rows = [
        [task, "not searched for", "-", "-"]
        if its["items"] is None
        else [task, f"{its['items']:,}", f"{its['removed']:,}", f"{its['left']:,}"]
        for task, its in tasks.items()
    ]
    header = [
        "evaluation items in the training texts",
        "searched for",
        "removed",
        f"left ({words} shared words in a row)",
    ]
    return table(header, rows) + "\n\nSource: `contamination.json` of the data."


def _beside_published(results: dict[str, Any], models: dict[str, str]) -> str:
    """Return our scores beside published scores; nothing if the suite has no published scores."""
    published = results["published"]
    if not published:
        return ""
    ours = results["evaluation"]
    columns = {name: its for name, its in published["columns"].items() if all(name in ours[model] for model in models)}
    if not columns:
        return ""
    rows = [
        [label(name), *(f"{value:.2f}" for value in its), *(_percent(ours[model][name]) for model in models)]
        for name, its in columns.items()
    ]
    means = [statistics.fmean(side) for side in zip(*columns.values(), strict=True)]
    means += [100 * statistics.fmean(ours[model][name]["value"] for name in columns) for model in models]
    header = ["%", *(f"published: {name}" for name in published["models"]), *models.values()]
    return "\n\n".join(
        [
            table(header, [*rows, ["mean of the rows", *(f"{mean:.2f}" for mean in means)]]),
            f"Published values: {plain(published['source'])}. Other versions of lm-eval, prompts and number formats"
            " change such values by some tenths, so compare differences rather than values.",
        ]
    )


def _percent(found: dict[str, float | None]) -> str:
    keys = ("value", "low", "high")
    return mean_with_interval({key: None if (one := found[key]) is None else 100 * one for key in keys})


def _evaluation_files(names: Iterable[str]) -> str:
    return sources(*(f"evaluation/{name}.json" for name in names))


def _judged(paired: dict[str, Any], a: str, b: str) -> str:
    words = verdict(paired, MODELS[a], MODELS[b])
    return f"{difference(paired)} ({words})" if words else difference(paired)


def _too_few(results: dict[str, Any]) -> str:
    """Say which trainings are too short for a verdict; return nothing if all are long enough."""
    steps = {MODELS[TRAINED[stage]]: done["steps"] for stage, done in results["training"].items()}
    short = [f"{title} {count:,}" for title, count in steps.items() if is_trial(count)]
    return f"Below {FEW_STEPS} steps there is no verdict: {', '.join(short)}." if short else ""


def samples(results: dict[str, Any]) -> str:
    """Return each model's continuations of some held-out texts; nothing if there are no continuations."""
    tables = []
    for sample in results["samples"]:
        texts = {"prompt": sample["prompt"], "the original text": sample["goes_on"]}
        texts |= {MODELS[name]: text for name, text in sample["continuations"].items()}
        tables.append(table(["", sample["document"]], [list(row) for row in texts.items()], words=1))
    if not tables:
        return ""
    about = (
        "How the models continue held-out texts, chosen by the suite's seed: the likeliest token each time, at most"
        f" {NEW_TOKENS} tokens. Samples illustrate the numbers and prove nothing."
    )
    return section("Samples", about, *tables, _evaluation_files(results["samples"][0]["continuations"]))


def step_zero(results: dict[str, Any]) -> str:
    """Return the section that compares the parent and the upcycled model before training."""
    step0, receipt = results["step0"], results["receipt"]
    rows = [
        ["changed answers", f"{step0['changed_answers']} of {step0['questions']}"],
        ["largest relative log-likelihood difference", number(step0["max_relative_loglikelihood_difference"], 3)],
        [
            "largest absolute log-likelihood difference (nats)",
            number(step0["max_absolute_loglikelihood_difference"], 3),
        ],
        ["log-likelihoods compared", str(step0["loglikelihoods"])],
    ]
    parts = [table(["compared after export, by lm-eval", "value"], rows), _evaluation_files(["dense", "step0"])]
    if "max_abs_logit_diff" in receipt:
        rows = [
            ["parent in Hugging Face", *_logit_row(receipt, "max_abs_logit_diff", "tolerance")],
            ["parent in Megatron", *_logit_row(receipt, "max_abs_logit_diff_same_stack", "tolerance_same_stack")],
        ]
        parts += [
            table(["MoE in Megatron compared with", "largest logit difference", "allowed"], rows),
            "The first row is in float32. The second is in float64, which removes rounding and leaves the effect of"
            " upcycling alone. In float32 the second row would be"
            f" {number(receipt.get('max_abs_logit_diff_same_stack_float32'), 3)}. Rounding alone changes the parent by"
            f" {number(receipt.get('parent_float32_rounding'), 3)} (float32 against float64)."
            f" The comparison has {receipt['tokens_compared']} tokens, the largest logit is"
            f" {number(receipt['max_abs_logit'])}, and the likeliest token is the same on"
            f" {100 * receipt['same_argmax']:.4g} % of the tokens (`receipt.json`).",
        ]
    return section("Step 0: MoE compared with parent", *parts)


def _logit_row(receipt: dict[str, Any], value: str, tolerance: str) -> list[str]:
    return [number(receipt[value], 3), number(receipt[tolerance], 3)]
