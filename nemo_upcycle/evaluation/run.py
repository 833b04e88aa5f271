"""Evaluate one model with lm-eval and keep every item's log-likelihoods."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_upcycle.data.suites.lm_eval_tasks import LoadedTask, quiet
from nemo_upcycle.data.suites.local_tasks import data_files
from nemo_upcycle.data.suites.suite import SuiteTasks, load_suite_tasks
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.backends import Backend, ModelOptions, close_model, open_model
from nemo_upcycle.evaluation.compare import (
    INSTRUCTIONS,
    RATIOS,
    cluster_of,
    cluster_sums,
    jackknife_stderr,
    left_out,
    statistic,
)
from nemo_upcycle.evaluation.heldout import METRIC
from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.conf import read_yaml
from nemo_upcycle.utils.files import MARKER, read_json, require_complete, write_json


#: Number of bootstrap draws for the few hub metrics without a formula for the standard error.
_BOOTSTRAP_DRAWS = 1000
_AS_THE_SUITE = ModelOptions()


def evaluate(
    model_folder: Path,
    suite: Path,
    output: Path,
    *,
    name: str,
    limit: int | None = None,
    samples: bool = True,
    tasks: SuiteTasks | None = None,
    options: ModelOptions = _AS_THE_SUITE,
) -> dict[str, Any]:
    """Evaluate a model, in the type that the suite names, and write `<output>/<name>.json`.

    Args:
        model_folder: a Hugging Face folder with safetensors weights and a tokenizer, or a NeMo or Megatron checkpoint.
        suite: folder that `build_suite` wrote. A local suite downloads nothing. lm-eval's own tasks are
            downloaded from the hub before the model is loaded. A task whose data are unavailable is left out, unless
            the suite is `strict`.
        output: folder for the result.
        name: the model's name in the report, for example `dense`.
        limit: take only the first items of each task, for a quick look.
        samples: whether the model also continues the suite's prompts.
        tasks: result of `load_suite_tasks`, to ask several models the same questions; None loads the tasks.
        options: how to open the model; values that are None come from the suite.

    Returns:
        The result that was written: `metrics` (`task/metric` -> `value`, `stderr`, `higher_is_better`), `items` (task
        -> an entry for each item: `id`, `hash`, `loglikelihoods` in nats, `scores`, and `answer` for a question),
        `groups` (task groups -> their tasks), `missing` (task -> why its data are unavailable), `samples` (the suite's
        prompts, each with its `continuation`), and the software and settings of the measurement.

    Raises:
        CheckpointError: the folder is not a model, or its weights do not fit the model exactly.
        UpcycleError: the suite is incomplete, lm-eval does not know a task, no task's data are available, vLLM is
            requested but missing, or the suite needs a chat template that the model lacks.

    Example:
        >>> evaluate(Path("models/dense"), Path("runs/suite"), Path("runs/evaluation"), name="dense")  # doctest: +SKIP
    """
    start_s = time.monotonic()
    require_complete(suite, "suite", "build the suite")
    config = read_json(suite / MARKER)["config"]
    with _offline(config["local"]):
        tasks = tasks or load_suite_tasks(suite)
        model = open_model(
            model_folder,
            backend=options.backend or config["backend"],
            dtype=config["dtype"],
            batch_size=options.batch_size or config["batch_size"],
            label=name,
            megatron=options.megatron,
        )
        loaded_s = time.monotonic() - start_s
        try:
            answers = ask(model, suite, samples=samples, limit=limit, tasks=tasks)
        finally:
            close_model(model)
    result = {"name": name, "model": {"folder": str(model_folder), **model.facts}, **answers}
    result["settings"] = {**answers["settings"], "dtype": config["dtype"], "limit": limit}
    result["seconds"] = {"load": loaded_s, **answers["seconds"], "total": time.monotonic() - start_s}
    write_json(output / f"{name}.json", result)
    return result


def ask(
    model: Backend, suite: Path, *, samples: bool, limit: int | None = None, tasks: SuiteTasks | None = None
) -> dict[str, Any]:
    """Ask an open model every question of a suite.

    Args:
        model: result of `open_model`, or the live model of a training.
        suite: folder of the suite.
        samples: whether the model also continues the suite's prompts.
        limit: take only the first items of each task.
        tasks: result of `load_suite_tasks`; None loads the tasks.

    Returns:
        The result of `evaluate`, without the model's name and folder.
    """
    start_s = time.monotonic()
    described = read_json(suite / MARKER)
    config = described["config"]
    texts = model.continue_prompts(described["prompts"] if samples else [])
    sampled_s = time.monotonic()
    merged: dict[str, Any] = {"metrics": {}, "items": {}, "groups": {}}
    tasks = tasks or load_suite_tasks(suite)
    if config["chat_template"] and not getattr(model.lm.tokenizer, "chat_template", None):
        raise UpcycleError(
            "The model's tokenizer",
            kind="missing",
            got="has no chat template, and the suite sets chat_template: true",
            fix="evaluate a model that was tuned on conversations, or omit chat_template",
        )
    if config["local"]:
        runs: dict[int | None, list[LoadedTask]] = {None: [_local_task(suite, task) for task in described["tasks"]]}
    else:
        numbers = sorted({shots for numbers in config["tasks"].values() for shots in numbers})
        runs = {
            shots: [task for name, task in tasks.loaded.items() if shots in config["tasks"][name]] for shots in numbers
        }
    for shots, asked in runs.items():
        if asked:
            results = _run(model.lm, asked, shots, limit, chat_template=config["chat_template"])
            for part, values in _extract(results, f"_{shots}shot" if shots else "").items():
                merged[part].update(values)
    return {
        "suite": described,
        "settings": {"backend": model.name, "device": model.device, "batch_size": model.batch_size},
        "versions": _versions(),
        "seconds": {"samples": sampled_s - start_s, "total": time.monotonic() - start_s},
        "samples": texts,
        "missing": tasks.missing,
        **merged,
    }


def _run(
    lm: Any, tasks: list[LoadedTask], shots: int | None, limit: int | None, *, chat_template: bool
) -> dict[str, Any]:
    """Run lm-eval on some tasks with one number of few-shot examples; None uses the task's own number."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    own = [(one, one.config.num_fewshot) for task in tasks for one in task.tasks]
    try:
        # lm-eval needs seconds to describe the machine, and a training may be waiting. `versions` has the necessary
        # facts. lm-eval's Git commit is the commit of the user's current folder.
        with (
            quiet(),
            temporarily_set(evaluator, "add_env_info", lambda results: None),
            temporarily_set(evaluator, "get_git_commit_hash", lambda: None),
        ):
            return evaluator.simple_evaluate(
                model=lm,
                tasks=[one for task in tasks for one in ([task.group] if task.group else task.tasks)],
                num_fewshot=shots,  # 0 means no examples, even if a task's own number is 5
                limit=limit,
                apply_chat_template=chat_template,
                bootstrap_iters=_BOOTSTRAP_DRAWS,
                random_seed=None,  # keep the random state of the process, which may be training
                numpy_random_seed=None,
                torch_random_seed=None,
                task_manager=TaskManager(include_defaults=False),  # no task is looked up by name
                log_samples=True,
            )
    finally:
        for one, number in own:  # undo lm-eval's change of the task's number
            one.set_config("num_fewshot", number)


def _local_task(folder: Path, name: str) -> LoadedTask:
    """Return a task of a suite, with paths of its data that point into the suite's present folder."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()  # local files load at once
    definition = read_yaml(folder / f"{name}.yaml", "suite's task")
    definition |= {"dataset_kwargs": data_files(folder, name)}
    with quiet():
        return LoadedTask(list(TaskManager(include_defaults=False).load([definition])["tasks"].values()))


def _extract(results: dict[str, Any], suffix: str) -> dict[str, dict[str, Any]]:
    """Turn lm-eval's results into `metrics`, `items` and `groups`; `suffix` ends every task's name."""
    # If a task reads answers in several ways (gsm8k: strict and flexible), use the first way, as in other reports of
    # such tasks.
    filters = {task: samples[0]["filter"] for task, samples in results["samples"].items()}
    items = {
        task: [_item(sample) for sample in samples if sample["filter"] == filters[task]]
        for task, samples in results["samples"].items()
    }
    metrics: dict[str, Any] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or name != filters.setdefault(task, name):
                continue
            stderr = values.get(key.replace(",", "_stderr,", 1))
            if metric in RATIOS and task in items:  # lm-eval has no stderr for the perplexity of whole texts
                stderr = jackknife_stderr(left_out(metric, _sums(metric, items[task])))
            metrics[f"{task}{suffix}/{metric}"] = {
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,
                "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
            }
    for task, entries in items.items():
        if METRIC in entries[0]["scores"] and f"{task}{suffix}/{METRIC}" not in metrics:
            metrics[f"{task}{suffix}/{METRIC}"] = _bits_per_byte(entries)
    children = results.get("group_subtasks", {})
    groups = {task: _leaves(task, children) for task, below in children.items() if below}
    return {
        "metrics": metrics,
        "items": {f"{task}{suffix}": entries for task, entries in items.items()},
        "groups": {f"{task}{suffix}": [f"{leaf}{suffix}" for leaf in leaves] for task, leaves in groups.items()},
    }


def _sums(metric: str, items: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the two sums that make a metric, for each cluster of a task's items."""
    return cluster_sums(metric, [item["scores"][metric] for item in items], [cluster_of(item) for item in items])


def _bits_per_byte(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = _sums(METRIC, items)
    value, stderr = statistic(METRIC, sums), jackknife_stderr(left_out(METRIC, sums))
    return {"value": value, "stderr": stderr, "higher_is_better": False}


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an lm-eval sample that is kept."""
    responses = [entry if isinstance(entry, (list, tuple)) else (entry,) for entry in sample["filtered_resps"]]
    likelihoods = [float(first) for first, *_ in responses if isinstance(first, (int, float))]
    item: dict[str, Any] = {"id": sample["doc_id"], "hash": sample["doc_hash"], "loglikelihoods": likelihoods}
    if len(likelihoods) > 1:
        item["answer"] = likelihoods.index(max(likelihoods))
    # An item is not independent of the other windows of its document, or of the other questions of its subject.
    if (
        cluster := next((sample["doc"][key] for key in ("document", "subject") if key in sample["doc"]), None)
    ) is not None:
        item["cluster"] = cluster
    item["scores"] = {metric: sample[metric] for metric in sample["metrics"]}
    for metric in (metric for metric in INSTRUCTIONS if metric in item["scores"]):
        followed = item["scores"][metric]
        item["scores"][metric] = [sum(followed), len(followed)]
    if size_bytes := sample["doc"].get("answer_bytes"):  # lm-eval gives bits per byte for texts, but not for answers
        item["scores"][METRIC] = [likelihoods[0], size_bytes]
    return item


def _leaves(task: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    below = children.get(task)
    return [leaf for child in below for leaf in _leaves(child, children)] if below else [task]


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keep the Hugging Face libraries offline; this affects only libraries that are not imported yet."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if wanted else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _versions() -> dict[str, str]:
    used: list[str] = [name for name in ("lm_eval", "transformers", "torch", "vllm") if name in sys.modules]
    packages: dict[str, str] = {name: version(name) for name in used}
    return {"nemo_upcycle": __version__, "python": platform.python_version(), **packages}
