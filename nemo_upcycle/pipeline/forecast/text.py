"""A forecast as text for a console: at most 119 columns, the submitted scripts in full at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.pipeline.executors.ft import USUAL_GIB_S
from nemo_upcycle.pipeline.executors.performance import TABLE, lines_of
from nemo_upcycle.pipeline.forecast.disk import DiskForecast
from nemo_upcycle.pipeline.forecast.network import NetworkForecast
from nemo_upcycle.pipeline.forecast.performance import performance_settings
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
        ("Trainings", _training_lines(trainings, _training_cells)),
        ("Performance settings in force", _training_lines(trainings, performance_settings)),
        ("Does it pay", _wrapped(forecast.advice, _INDENT)),
        ("Scores", _score_lines(forecast)),
        (f"Disk of {forecast.disk.folder}", _disk_lines(forecast.disk)),
        ("Network", _network_lines(forecast.network)),
        ("Settings, and where each comes from", _setting_lines(forecast.settings)),
        (f"Performance settings by {TABLE}, and why each", lines_of(forecast.performance)),
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
        "teacher": "",
    }
    if facts.teacher_weight:
        flops = flops_per_token(arch.dense, facts.seq_length, causal=True) / 3 * training.tokens
        cells["teacher"] = (
            f"weight {facts.teacher_weight:g}; the parent answers once before: at most {flops:.1e} FLOPs"
        )
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
    if evaluation := training.evaluation:
        texts = "all texts" if evaluation.texts is None else f"{evaluation.texts:,} texts"
        cells["evaluation"] = f"{texts} of {evaluation.suite} every {evaluation.every_n_steps:,} steps"
        if evaluation.seconds is not None and evaluation.share is not None:
            share = f"{100 * evaluation.share:.2g} % of the time"
            cells["evaluation"] += f": at most {evaluation.seconds:.1f} s, {share}"
    return cells


def _training_lines(
    trainings: Sequence[TrainingForecast], cells_of: Callable[[TrainingForecast], dict[str, str]]
) -> list[str]:
    """Return a table with a column for each training that runs."""
    cells = {training.stage.name: cells_of(training) for training in trainings if training.stage.runs}
    if not cells:
        return []
    names = next(iter(cells.values()))
    rows = [["", *cells], *([name, *(column[name] for column in cells.values())] for name in names)]
    rows = [row for row in rows if any(row[1:])]
    first = max(len(row[0]) for row in rows)
    each = (WIDTH - len(_INDENT) - first) // len(cells) - len("  ")
    return in_columns([part for row in rows for part in _over_lines(row, (first, *[each] * len(cells)))])


def _score_lines(forecast: Forecast) -> Iterator[str]:
    for name, training in forecast.trainings.items():
        if training.evaluation and training.first_score and training.stage.runs:
            step, seconds = training.first_score
            yield f"first of {name}: {_duration(seconds)}, {training.evaluation.suite} after step {step:,}"
    scores = forecast.scores
    if scores is None or scores.trainings_s is None:
        return
    if scores.evaluation_s is None:
        evaluation = f"evaluation not counted: {scores.suite} sets no bound of its texts"
    else:
        evaluation = f"evaluation {_duration(scores.evaluation_s)}, at a GPU's speed in training"
    seconds = scores.trainings_s + (scores.evaluation_s or 0.0)
    parts = f"trainings {_duration(scores.trainings_s)}, {evaluation}"
    yield from _wrapped(f"last: {_duration(seconds)} ({parts}), without queues and other stages", _INDENT)


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


#: The prefix of a group of settings -> its heading.
_GROUPS = {
    "": "",
    "pretrain.": "pretrain.",
    "dense_ct.": "dense_ct.  what is not named here is as in pretrain., from its own recipe",
    "run.executor.": "run.executor.",
}


def _setting_lines(settings: Sequence[Setting]) -> list[str]:
    """Return a line a setting, in groups; of the dense baseline only what is not as in the upcycled model."""
    usual = {setting.name: setting for setting in settings}
    groups: dict[str, list[tuple[str, str, str]]] = {prefix: [] for prefix in _GROUPS}
    for setting in settings:
        prefix = next(name for name in reversed(_GROUPS) if setting.name.startswith(name))
        name = setting.name.removeprefix(prefix)
        other = usual.get(f"pretrain.{name}") if prefix == "dense_ct." else None
        if other is None or (other.value, _kind(other)) != (setting.value, _kind(setting)):
            groups[prefix].append((_INDENT + name if prefix else name, setting.value, setting.origin))
    widths = [max(map(len, column)) for column in zip(*(row for rows in groups.values() for row in rows), strict=True)]
    room = WIDTH - len(_INDENT) - widths[0] - 2 * len("  ")
    widths[1] = max(20, min(widths[1], room - widths[2]))
    lines: list[str] = []
    for prefix, rows in groups.items():
        lines += [_GROUPS[prefix]] if prefix and rows else []
        for row in rows:
            value_width = max(widths[1], min(len(row[1]), room - len(row[2])))  # an address stays whole where it can
            sizes = [widths[0], value_width, widths[2]]
            parts = _over_lines(row, sizes)
            lines += ["  ".join(cell.ljust(size) for cell, size in zip(part, sizes, strict=True)) for part in parts]
    return lines


def _network_lines(network: NetworkForecast) -> Iterator[str]:
    if not network.stages:
        return
    width = max(map(len, network.stages))
    for stage, places in network.stages.items():
        for place, names in places.items():
            yield from _wrapped(f"{stage:<{width}}  {place}: {', '.join(names)}", " " * (width + 4))
    yield from _wrapped(f"for a run without one, first: {network.command}", _INDENT)


def _kind(setting: Setting) -> str:
    return "recipe" if setting.origin.startswith("recipe ") else setting.origin
