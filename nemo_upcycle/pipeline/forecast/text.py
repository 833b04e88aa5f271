"""A forecast as text for a console: at most 119 columns, the submitted scripts in full at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from nemo_upcycle.pipeline.executors.ft import USUAL_GIB_S
from nemo_upcycle.pipeline.executors.performance import TABLE, lines_of
from nemo_upcycle.pipeline.forecast.disk import DiskForecast
from nemo_upcycle.pipeline.forecast.network import NetworkForecast
from nemo_upcycle.pipeline.forecast.run import Forecast, Setting
from nemo_upcycle.pipeline.forecast.stages import StageForecast
from nemo_upcycle.pipeline.forecast.training import TrainingForecast
from nemo_upcycle.utils.console import in_columns
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.masking import without_secrets


WIDTH = 119
_INDENT = "  "


def render_forecast(forecast: Forecast) -> str:
    """Return a forecast as text, without a newline at its end."""
    heading = f"Forecast of {forecast.recipe} in {forecast.run_dir}. Nothing has been submitted or written yet."
    lines, trainings = _wrapped(heading, ""), list(forecast.trainings.values())
    sections: tuple[tuple[str, Iterable[str]], ...] = (
        ("Stages", _stage_lines(forecast.stages)),
        ("Trainings", _training_lines(trainings)),
        ("Does it pay", _wrapped(forecast.advice, _INDENT)),
        (f"Disk of {forecast.disk.folder}", _disk_lines(forecast.disk)),
        ("Network", _network_lines(forecast.network)),
        ("Settings", _setting_lines(forecast.settings)),
        (f"Performance settings by {TABLE}", lines_of(forecast.performance)),
        ("Warnings", (line for text in forecast.warnings for line in _wrapped(f"- {text}", _INDENT))),
    )
    for title, body in sections:
        if body_lines := list(body):
            lines += ["", title, *(f"{_INDENT}{line}".rstrip() for line in body_lines)]
    for stage in forecast.stages:
        for path, text in stage.files.items():
            lines += ["", f"--- {path}", *text.rstrip("\n").split("\n")]
    return without_secrets("\n".join(lines))


def _wrapped(text: str, hanging: str, room: int = WIDTH - len(_INDENT)) -> list[str]:
    return textwrap.wrap(text, room, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def _stage_lines(stages: Sequence[StageForecast]) -> Iterator[str]:
    widths = [max(len(stage.name) for stage in stages), max(len(stage.finding.state.value) for stage in stages)]
    hanging = " " * (sum(widths) + 4)
    for stage in stages:
        head = f"{stage.name:<{widths[0]}}  {stage.finding.state.value:<{widths[1]}}  "
        yield from _wrapped(head + stage.finding.why, hanging)
        if stage.runs:
            ranks = f"{_count(stage.nodes, 'node')} x {_count(stage.ranks_per_node, 'rank')}"
            asked = "".join(f"; {name} {value}" for name, value in stage.resources.items() if value)
            yield from _wrapped(f"{hanging}{stage.executor}: {ranks}{asked}", hanging)
            for path in stage.files:
                yield f"{hanging}{path}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _training_cells(training: TrainingForecast) -> dict[str, str]:
    """Return the rows of the table for a training, in their order, and their texts; empty where none is needed."""
    facts, layout, arch, stage = training.facts, training.facts.layout, training.facts.arch, training.stage
    sizes = {"TP": layout.tp, "PP": layout.pp, "VPP": layout.vp, "CP": layout.cp}
    sizes |= {"EP": layout.ep, "ETP": layout.etp} if arch.num_experts else {}
    lost = min(facts.save_every, facts.steps)
    cells = {
        "recipe": facts.recipe,
        "parameters": f"{_params(arch.total_params)}, {_params(arch.active_params)} active",
        "ranks": f"{stage.nodes} x {stage.ranks_per_node} = {layout.gpus}",
        "layout": " ".join(f"{name}{size}" for name, size in (sizes | {"DP": layout.dp}).items()),
        "precision": facts.profile.precision,
        "batch": f"{facts.global_batch} x {facts.seq_length} = {facts.step_tokens:,} tokens a step",
        "micro-batch": str(layout.micro_batch),
        "steps": f"{facts.steps:,}",
        "tokens": f"{training.tokens:,}",
        "GPU": f"{training.gpu.name}, {training.gpu_origin}" if training.gpu else training.gpu_origin,
        **dict.fromkeys(("memory a GPU", "step", "speed"), ""),
        "time": f"no estimate of the speed: {training.no_plan}",
        **dict.fromkeys(("cost", "jobs"), ""),
        "checkpoint": (
            f"{size_text(facts.checkpoint_bytes)} every {facts.save_every:,} steps,"
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
        "evaluation": "",
    }
    if evaluations := facts.evaluations:
        cells["evaluation"] = f"{evaluations.suite} every {evaluations.every_n_steps:,} steps"
    if training.steps_left != facts.steps:
        cells["steps"] += f", {training.steps_left:,} of them left"
    if training.first and training.later and training.fullest:
        gib = training.fullest.request.gpu.memory_gib
        verdict = {"no": "does not fit"}.get(training.fullest.verdict, training.fullest.verdict)
        cells["memory a GPU"] = f"{training.memory_gib:.1f} of {gib} GiB: {verdict}"
        cells["step"] = f"{training.later.time.total:.2f} s"
        if facts.first_steps:
            cells["step"] += f" ({training.first.time.total:.2f} s in the first {facts.first_steps})"
        tflops = training.later.tflops_per_gpu(causal=False)
        cells["speed"] = f"{tflops:.0f} TFLOP/s a GPU, MFU {100 * training.later.mfu:.1f} %"
        cells["cost"] = "no price of a GPU-hour is known"
    if training.seconds_left is not None:
        cells["time"] = f"{_duration(training.seconds_left)}, {training.gpu_hours_left:,.0f} GPU-hours"
    if training.cost_left is not None:
        cells["cost"] = f"{training.cost_left:,.0f} at {training.price:g} a GPU-hour"
    if training.jobs_left is not None and training.limit_s:
        cells["jobs"] = f"{training.jobs_left:,} of {training.limit_s / 3600:g} h"
    if (loss_s := training.longest_loss_s) is not None:
        cells["lost by a kill"] += f": {_duration(loss_s)}, {loss_s / 3600 * layout.gpus:,.0f} GPU-hours"
    return cells


def _training_lines(trainings: Sequence[TrainingForecast]) -> list[str]:
    """Return a table with a column for each training that runs."""
    cells = {training.stage.name: _training_cells(training) for training in trainings if training.stage.runs}
    if not cells:
        return []
    names = next(iter(cells.values()))
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
    """Return a row of a table as several, where a cell is wider than its column; a long word is cut, a path is one."""
    cells = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell, width in zip(row, widths, strict=True)
    ]
    height = max(map(len, cells))
    return [[cell[line] if line < len(cell) else "" for cell in cells] for line in range(height)]


def _params(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _disk_lines(disk: DiskForecast) -> list[str]:
    rows = [["stage", "what", "while it is written", "stays"]]
    for use in disk.uses:
        known = [size_text(use.new_peak_bytes), size_text(use.kept_bytes)]
        rows.append([use.stage, use.what, *(known if use.kept_bytes else ["not known"] * 2)])
    verdict = "fits" if disk.fits else "DOES NOT FIT"
    total = f"{size_text(disk.needed_bytes)} at one moment at most, {size_text(disk.free_bytes)} free: {verdict}"
    return [*(in_columns(rows, right=(2, 3)) if disk.uses else []), total]


def _setting_lines(settings: Sequence[Setting]) -> list[str]:
    """Return a line a setting; of the dense baseline only what is not as in the upcycled model."""
    usual = {setting.name: setting.value for setting in settings}
    baseline = "dense_ct."
    rows = [
        [setting.name, setting.value]
        for setting in settings
        if not setting.name.startswith(baseline)
        or usual.get(f"pretrain.{setting.name.removeprefix(baseline)}") != setting.value
    ]
    first = max(len(name) for name, _ in rows)
    widths = (first, WIDTH - len(_INDENT) - first - len("  "))
    return in_columns([part for row in rows for part in _over_lines(row, widths)])


def _network_lines(network: NetworkForecast) -> Iterator[str]:
    if not network.stages:
        return
    width = max(map(len, network.stages))
    for stage, places in network.stages.items():
        for place, names in places.items():
            yield from _wrapped(f"{stage:<{width}}  {place}: {', '.join(names)}", " " * (width + 4))
    yield from _wrapped(f"for a run without one, first: {network.command}", _INDENT)
