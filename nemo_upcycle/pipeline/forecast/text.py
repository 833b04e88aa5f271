"""Render a forecast for 120 columns: one screen with the facts for a decision, or all facts with `verbose`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import accumulate, groupby
from operator import itemgetter

from nemo_upcycle.pipeline.executors.ft import USUAL_GIB_S
from nemo_upcycle.pipeline.executors.performance import TABLE
from nemo_upcycle.pipeline.forecast.disk import DiskForecast
from nemo_upcycle.pipeline.forecast.network import NetworkForecast
from nemo_upcycle.pipeline.forecast.run import RECIPE, Forecast
from nemo_upcycle.pipeline.forecast.stages import NOT_RUN, StageForecast
from nemo_upcycle.pipeline.forecast.training import TrainingForecast
from nemo_upcycle.planning.failures import USUAL_GPU_HOURS
from nemo_upcycle.recipes import recipe_file
from nemo_upcycle.utils.console import in_columns
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.masking import without_secrets


WIDTH = 119
#: Origin of the usual rate of failures.
_LLAMA = " (as in Llama 3's training)"
_INDENT, _GOES_ON = "  ", " \\"
#: Rows of the trainings' table that are shown without `verbose`, so that the forecast fits on one screen.
_DECISIVE = (
    *("parameters", "layout", "batch", "tokens", "GPU", "memory a GPU", "step"),
    *("time", "expected", "cost", "jobs", "checkpoint"),
)


def render_forecast(forecast: Forecast, *, verbose: bool = False) -> str:
    """Return a forecast as text, without a newline at the end. The last line says what to do next.

    Args:
        forecast: forecast of the run.
        verbose: whether to add the details of all stages, every setting with its origin, and NVIDIA's settings.
    """
    heading = f"Forecast of {forecast.recipe} in {forecast.run_dir}. Nothing has been submitted or written yet."
    lines, trainings = _wrapped(heading, ""), list(forecast.trainings.values())
    if file := recipe_file(forecast.recipe):
        lines.append(f"The recipe is {file}.")
    common = {} if verbose else _common([_asked(stage) for stage in forecast.stages if stage.runs])
    settings = [one for one in forecast.settings if verbose or one.origin != RECIPE]
    sections: tuple[tuple[str, Iterable[str]], ...] = (
        (
            f"Stages{f' on {_phrase(common)}' if common else ''}",
            _stage_lines(forecast.stages, common, verbose=verbose),
        ),
        ("Trainings", _training_lines(trainings, forecast.now, verbose=verbose)),
        (f"Disk of {forecast.disk.folder}", _disk_lines(forecast.disk, verbose=verbose)),
        ("Network", _network_lines(forecast.network, verbose=verbose)),
        ("Settings", in_columns([[one.name, *([one.origin] if verbose else []), one.value] for one in settings])),
        (f"Performance settings by {TABLE}", _performance_lines(forecast.performance) if verbose else ()),
        ("Warnings", _listed(forecast.warnings)),
        ("Not checked", _listed(forecast.unchecked)),
        ("It would not start:", _listed(map(str, forecast.problems))),
        ("It would not fit:", _listed(forecast.misfits)),
    )
    for title, body in sections:
        if body_lines := list(body):
            lines += ["", *_wrapped(title, _INDENT), *(f"{_INDENT}{line}".rstrip() for line in body_lines)]
    if not (forecast.problems or forecast.misfits):
        fits = "fits" if forecast.is_known else "fits, as far as known"
        lines += ["", f"It would run and {fits}. Start it: the same command with --yes"]
    return without_secrets("\n".join(lines))


def _wrapped(text: str, hanging: str, room: int = WIDTH - len(_INDENT)) -> list[str]:
    """Break a text into lines. If a command in backticks is broken, a shell still accepts it."""
    room -= len(_GOES_ON) * ("`" in text)
    lines = textwrap.wrap(text, room, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
    ends = accumulate(line.count("`") for line in lines)
    return [line + _GOES_ON * (end % 2) for line, end in zip(lines, ends, strict=True)]


def _listed(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _wrapped(f"- {text}", _INDENT)


def _asked(stage: StageForecast) -> dict[str, str]:
    """Return a stage's executor (under an empty name) and the resources that the stage asks for, by name."""
    return {"": stage.executor, **{name: value for name, value in stage.resources.items() if value}}


def _common(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the entries that all mappings share; nothing if the executors differ."""
    first = rows[0] if rows else {}
    found = {name: value for name, value in first.items() if all(row.get(name) == value for row in rows)}
    return found if "" in found else {}


def _phrase(asked: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}".strip() for name, value in asked.items())


def _stage_lines(stages: Sequence[StageForecast], common: Mapping[str, str], *, verbose: bool) -> Iterator[str]:
    """Yield a line for each stage, without `common` entries. Successive stages with equal texts share a line."""
    rows = []
    for stage in stages:
        own = {name: value for name, value in _asked(stage).items() if common.get(name) != value}
        size = f"{_count(stage.nodes, 'node')} x {_count(stage.ranks_per_node, 'rank')}"
        why = stage.finding.why if verbose or not stage.finding.why.startswith(NOT_RUN) else ""
        parts = (why, size, _phrase(own)) if stage.runs else (why,)
        rows.append(((stage.finding.state.value, "; ".join(filter(None, parts))), stage.name))
    groups = [(", ".join(name for _, name in alike), *key) for key, alike in groupby(rows, key=itemgetter(0))]
    widths = [max(len(group[column]) for group in groups) for column in (0, 1)]
    for names, state, text in groups:
        head = f"{names:<{widths[0]}}  {state:<{widths[1]}}  "
        yield from _wrapped(head + text, " " * len(head))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _training_cells(training: TrainingForecast, now: datetime) -> dict[str, str]:
    """Return the text of each table row for a training, in order; the text is empty if the row does not apply."""
    facts, layout, arch, stage = training.facts, training.facts.layout, training.facts.arch, training.stage
    sizes = {"TP": layout.tp, "PP": layout.pp, "VPP": layout.vp, "CP": layout.cp}
    sizes |= {"EP": layout.ep, "ETP": layout.etp} if arch.num_experts else {}
    lost, hours = min(facts.saving.every_n_steps, facts.steps), training.gpu_hours_between_failures
    cells = {
        "recipe": facts.recipe,
        "parameters": f"{_params(arch.total_params)}, {_params(arch.active_params)} active",
        "ranks": f"{stage.nodes} x {stage.ranks_per_node} = {layout.gpus}",
        "layout": " ".join(f"{name}{size}" for name, size in (sizes | {"DP": layout.dp}).items()),
        "precision": facts.profile.precision,
        "batch": f"{facts.global_batch} x {facts.seq_length} = {facts.step_tokens:,} tokens a step",
        "micro-batch": str(layout.micro_batch),
        "tokens": f"{training.tokens:,} in {_count(facts.steps, 'step')}",
        "GPU": f"{training.gpu.name}, {training.gpu_origin}" if training.gpu else training.gpu_origin,
        **dict.fromkeys(("memory a GPU", "step", "speed"), ""),
        "time": f"no estimate of the speed: {training.no_plan}",
        **dict.fromkeys(("expected", "cost", "jobs"), ""),
        "checkpoint": (
            f"{size_text(facts.checkpoint_bytes)} every {facts.saving.every_n_steps:,} steps,"
            f" {training.checkpoints_at_once} at once"
        ),
        "save": (
            f"{training.save_s:,.0f} s at {training.write_gib_s:g} GiB/s"
            f"{' (assumed)' * (training.write_gib_s == USUAL_GIB_S)},"
            f" {size_text(facts.checkpoint_bytes // layout.gpus)} a rank"
        ),
        "save in time": ", ".join(
            f"{training.save_gib_s(limit):.3g} GiB/s ({limit.what})" for limit in stage.save_limits
        ),
        "lost by a kill": f"at most {_count(lost, 'step')}",
        "failures": (
            f"one in {_duration(training.between_failures_s)}{_LLAMA * (hours == USUAL_GPU_HOURS)},"
            f" restart {training.restart_s:,.0f} s ({training.restart_origin})"
        ),
        **dict.fromkeys(("goodput", "evaluation"), ""),
    }
    if evaluations := facts.evaluations:
        cells["evaluation"] = f"{evaluations.suite} every {evaluations.every_n_steps:,} steps"
    if training.steps_left != facts.steps:
        cells["tokens"] += f", {training.steps_left:,} of them left"
    if training.first and training.later and training.fullest:
        gib = training.fullest.request.gpu.memory_gib
        verdict = {"no": "does not fit"}.get(training.fullest.verdict, training.fullest.verdict)
        cells["memory a GPU"] = f"{training.memory_gib:.1f} of {gib} GiB: {verdict}"
        cells["step"] = f"{training.later.time.total:.2f} s"
        if facts.computation.first_steps:
            cells["step"] += f" ({training.first.time.total:.2f} s in the first {facts.computation.first_steps})"
        tflops = training.later.tflops_per_gpu(causal=False)
        cells["speed"] = f"{tflops:.0f} TFLOP/s a GPU, MFU {100 * training.later.mfu:.1f} %"
    if training.seconds_left is not None:
        cells["time"] = f"{_duration(training.seconds_left)}, {training.gpu_hours_left:,.0f} GPU-hours"
    if (share := training.goodput(lost)) is not None and (best := training.best_every_n_steps):
        most = training.goodput(best) or 0.0
        cells["goodput"] = f"{100 * share:.1f} % ({100 * most:.1f} % with a checkpoint every {best:,} steps)"
    if training.seconds_with_failures:
        end = now + timedelta(seconds=training.seconds_with_failures)
        cells["expected"] = f"{_duration(training.seconds_with_failures)} with failures, to {end:%Y-%m-%d %H:%M}"
    if training.cost_left is not None:
        cells["cost"] = f"{training.cost_left:,.0f} at {training.price:g} a GPU-hour"
    if training.jobs_left is not None and training.limit_s:
        cells["jobs"] = f"{training.jobs_left:,} of {training.limit_s / 3600:g} h"
    if (loss_s := training.longest_loss_s) is not None:
        cells["lost by a kill"] += f": {_duration(loss_s)}, {loss_s / 3600 * layout.gpus:,.0f} GPU-hours"
    return cells


def _training_lines(trainings: Sequence[TrainingForecast], now: datetime, *, verbose: bool) -> list[str]:
    """Return a table with a column for each training that runs."""
    cells = {training.stage.name: _training_cells(training, now) for training in trainings if training.stage.runs}
    if not cells:
        return []
    names = next(iter(cells.values())) if verbose else _DECISIVE
    rows = [["", *cells], *([name, *(column[name] for column in cells.values())] for name in names)]
    rows = [row for row in rows if any(row[1:])]
    first = max(len(row[0]) for row in rows)
    each = (WIDTH - len(_INDENT) - first) // len(cells) - len("  ")
    return in_columns([part for row in rows for part in _over_lines(row, (first, *[each] * len(cells)))])


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _over_lines(row: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """Split a table row into several rows if a cell is wider than its column. Long words, such as paths, are cut."""
    cells = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell, width in zip(row, widths, strict=True)
    ]
    height = max(map(len, cells))
    return [[cell[line] if line < len(cell) else "" for cell in cells] for line in range(height)]


def _params(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _disk_lines(disk: DiskForecast, *, verbose: bool) -> Iterator[str]:
    """Yield the largest disk use at one moment and the free space; with `verbose`, first the use of each stage."""
    if verbose and disk.uses:
        rows = [["stage", "what", "while it is written", "stays"]]
        for use in disk.uses:
            known = [size_text(use.new_peak_bytes), size_text(use.kept_bytes)]
            rows.append([use.stage, use.what, *(known if use.kept_bytes else ["not known"] * 2)])
        yield from in_columns(rows, right=(2, 3))
    largest = max(disk.uses, key=lambda use: use.new_peak_bytes, default=None)
    most = f" ({largest.what}: {size_text(largest.new_peak_bytes)})" if largest else ""
    free = "unknown free space" if disk.free_bytes is None else size_text(disk.free_bytes)
    verdict = "" if disk.free_bytes is None else ": fits" if disk.fits else ": DOES NOT FIT"
    yield f"{size_text(disk.needed_bytes)} at its peak{most}, {free} free{verdict}"


def _performance_lines(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return NVIDIA's settings of the trainings, one per line, with the stages that they apply to."""
    stages: dict[tuple[str, str], list[str]] = {}
    for stage, settings in found.items():
        for setting in settings.items():
            stages.setdefault(setting, []).append(stage)
    only = {len(found): ""}
    rows = [[name, value + only.get(len(own), f"; {' and '.join(own)} only")] for (name, value), own in stages.items()]
    return in_columns(rows)


def _network_lines(network: NetworkForecast, *, verbose: bool) -> Iterator[str]:
    """Yield the stages that fetch items, the sources (with `verbose`, the items), and a command to fetch all items."""
    if not network.stages:
        return
    width = max(map(len, network.stages))
    for stage, places in network.stages.items() if verbose else ():
        for place, names in places.items():
            yield from _wrapped(f"{stage:<{width}}  {place}: {', '.join(names)}", " " * (width + 4))
    fetch = f"for a run without one, first: `{network.command}`"
    if not verbose:
        where = dict.fromkeys(place for places in network.stages.values() for place in places)
        fetch = f"{', '.join(network.stages)}: from {', '.join(where)}; {fetch}"
    yield from _wrapped(fetch, _INDENT)
