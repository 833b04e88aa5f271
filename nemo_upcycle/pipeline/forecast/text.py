"""A forecast as text for a console: at most 119 columns, the submitted scripts in full at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from nemo_upcycle.pipeline.executors.performance import TABLE, lines_of
from nemo_upcycle.pipeline.forecast.disk import DiskForecast
from nemo_upcycle.pipeline.forecast.evaluating import EvaluationForecast
from nemo_upcycle.pipeline.forecast.run import Forecast
from nemo_upcycle.pipeline.forecast.settings import Setting
from nemo_upcycle.pipeline.forecast.stages import StageForecast
from nemo_upcycle.pipeline.forecast.training import TrainingForecast
from nemo_upcycle.utils.files import size_text


WIDTH = 119
_INDENT = "  "


def render_forecast(forecast: Forecast) -> str:
    """Return a forecast as text, without a newline at its end."""
    heading = f"Forecast of {forecast.recipe} in {forecast.run_dir}. Nothing has been submitted or written yet."
    lines = _wrapped(heading, "")
    sections: tuple[tuple[str, Iterable[str]], ...] = (
        ("Stages", _stage_lines(forecast.stages)),
        ("Trainings", _training_lines(list(forecast.trainings.values()))),
        (f"Disk of {forecast.disk.folder}", _disk_lines(forecast.disk)),
        ("Settings, and where each comes from", _setting_lines(forecast.settings)),
        (f"Performance settings by {TABLE}, and why each", lines_of(forecast.performance)),
        ("Warnings", (line for text in forecast.warnings for line in _wrapped(f"- {text}", _INDENT))),
    )
    for title, body in sections:
        if found := list(body):
            lines += ["", title, *(f"{_INDENT}{line}".rstrip() for line in found)]
    for stage in forecast.stages:
        for path, text in stage.files.items():
            lines += ["", f"--- {path}", *text.rstrip("\n").split("\n")]
    return "\n".join(lines)


def _wrapped(text: str, hanging: str, room: int = WIDTH - len(_INDENT)) -> list[str]:
    return textwrap.wrap(text, room, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return rows in columns two blanks apart; those in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


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


#: What is said of a training, in the order of the table.
_ROWS: dict[str, Callable[[TrainingForecast], str]] = {
    "recipe": lambda it: it.facts.recipe,
    "parameters": lambda it: f"{_params(it.facts.arch.total_params)}, {_params(it.facts.arch.active_params)} active",
    "ranks": lambda it: f"{it.stage.nodes} x {it.stage.ranks_per_node} = {it.facts.layout.gpus}",
    "layout": lambda it: _layout(it),
    "precision": lambda it: it.facts.profile.precision,
    "batch": lambda it: f"{it.facts.global_batch} x {it.facts.seq_length} = {it.facts.step_tokens:,} tokens a step",
    "micro-batch": lambda it: str(it.facts.layout.micro_batch),
    "steps": lambda it: (
        f"{it.facts.steps:,}" + (f", {it.steps_left:,} of them left" if it.steps_left != it.facts.steps else "")
    ),
    "tokens": lambda it: f"{it.tokens:,}",
    "card": lambda it: f"{it.card.gpu.name}, {it.card.why}" if it.card.gpu else it.card.why,
    "memory a GPU": lambda it: _memory(it),
    "step": lambda it: (
        f"{it.step_s:.2f} s"
        + (f" ({it.first.time.total:.2f} s in the first {it.facts.first_steps})" if it.facts.first_steps else "")
        if it.step_s and it.first
        else ""
    ),
    "speed": lambda it: (
        f"{it.later.tflops_per_gpu(causal=False):.0f} TFLOP/s a GPU, MFU {100 * it.later.mfu:.1f} %"
        if it.later
        else ""
    ),
    "time": lambda it: (
        f"{it.seconds_left / 3600:,.1f} h, {it.gpu_hours_left:,.0f} GPU-hours"
        if it.seconds_left is not None and it.gpu_hours_left is not None
        else f"no estimate of the speed: {it.no_plan}"
    ),
    "cost": lambda it: (
        f"{it.cost_left:,.0f} at {it.price:g} a GPU-hour"
        if it.cost_left is not None
        else "no price of a GPU-hour is known"
        if it.later
        else ""
    ),
    "jobs": lambda it: (
        f"{it.jobs_left:,} of {it.limit_s / 3600:g} h" if it.jobs_left is not None and it.limit_s else ""
    ),
    "checkpoint": lambda it: (
        f"{size_text(it.facts.checkpoint_bytes)} every {it.facts.save_every:,} steps, {it.checkpoints_at_once} at once"
    ),
    "save in time": lambda it: ", ".join(
        f"{it.save_gib_s(limit):.3g} GiB/s ({limit.what})" for limit in it.stage.save_limits
    ),
    "lost by a kill": lambda it: _loss(it),
    "evaluation": lambda it: _evaluation(it.evaluation) if it.evaluation else "",
}


def _training_lines(trainings: Sequence[TrainingForecast]) -> list[str]:
    ones = [training for training in trainings if training.stage.runs]
    if not ones:
        return []
    rows = [["", *(training.stage.name for training in ones)]]
    for name, cell in _ROWS.items():
        cells = [cell(training) for training in ones]
        if any(cells):
            rows.append([name, *cells])
    first = max(len(row[0]) for row in rows)
    each = (WIDTH - len(_INDENT) - first) // len(ones) - len("  ")
    return _table([part for row in rows for part in _over_lines(row, (first, *[each] * len(ones)))])


def _over_lines(row: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """Return a row of a table as several, where a cell is wider than its column; a long word is cut, a path is one."""
    cells = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""] for cell, width in zip(row, widths, strict=True)
    ]
    height = max(map(len, cells))
    return [[cell[line] if line < len(cell) else "" for cell in cells] for line in range(height)]


def _params(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _layout(training: TrainingForecast) -> str:
    sizes = training.facts.layout
    names = {"TP": "tp", "PP": "pp", "VPP": "vp", "CP": "cp", "EP": "ep", "ETP": "etp", "DP": "dp"}
    if not training.facts.arch.num_experts:
        names = {name: field for name, field in names.items() if name not in ("EP", "ETP")}
    return " ".join(f"{name}{getattr(sizes, field)}" for name, field in names.items())


def _memory(training: TrainingForecast) -> str:
    plan = training.fullest
    if plan is None:
        return ""
    words = {"fits": "fits", "tight": "tight", "no": "does not fit"}
    return f"{training.memory_gib:.1f} of {plan.request.gpu.memory_gib} GiB: {words[plan.verdict]}"


def _loss(training: TrainingForecast) -> str:
    lost = min(training.facts.save_every, training.facts.steps)
    if training.longest_loss_s is None:
        return f"at most {_count(lost, 'step')}"
    seconds = training.longest_loss_s
    gpu_hours = seconds / 3600 * training.facts.layout.gpus
    return f"at most {_count(lost, 'step')}: {seconds / 60:.1f} min, {gpu_hours:,.0f} GPU-hours"


def _evaluation(found: EvaluationForecast) -> str:
    texts = "all texts" if found.texts is None else f"{found.texts:,} texts"
    text = f"{texts} of {found.suite} every {found.every_n_steps:,} steps"
    if found.seconds is None or found.share is None:
        return text
    return f"{text}: at most {found.seconds:.1f} s, {100 * found.share:.2g} % of the time"


def _disk_lines(disk: DiskForecast) -> list[str]:
    rows = [["stage", "what", "while it is written", "stays"]]
    for use in disk.uses:
        known = [size_text(use.new_peak_bytes), size_text(use.kept_bytes)]
        rows.append([use.stage, use.what, *(known if use.kept_bytes else ["not known"] * 2)])
    verdict = "fits" if disk.fits else "DOES NOT FIT"
    total = f"{size_text(disk.needed_bytes)} at one moment at most, {size_text(disk.free_bytes)} free: {verdict}"
    return [*(_table(rows, right=(2, 3)) if disk.uses else []), total]


#: The prefix of a group of settings -> what its heading adds.
_GROUPS = {
    "pretrain.": "",
    "dense_ct.": "what is not named here is as in pretrain., from its own recipe",
    "run.executor.": "",
}


def _setting_lines(settings: Sequence[Setting]) -> list[str]:
    """Return a line a setting, in groups; of the dense baseline only what is not as in the upcycled model."""
    usual = {setting.name: setting for setting in settings}
    rows: list[tuple[str, str, str]] = []
    headings: dict[int, str] = {}
    group = ""
    for setting in settings:
        prefix = next((name for name in _GROUPS if setting.name.startswith(name)), "")
        name = setting.name.removeprefix(prefix)
        if prefix != group:
            headings[len(rows)], group = f"{prefix}  {_GROUPS[prefix]}".rstrip(), prefix
        other = usual.get(f"pretrain.{name}") if prefix == "dense_ct." else None
        if other is None or (other.value, _kind(other)) != (setting.value, _kind(setting)):
            rows.append((_INDENT + name if prefix else name, setting.value, setting.origin))
    widths = [max(len(row[number]) for row in rows) for number in range(3)]
    room = WIDTH - len(_INDENT) - widths[0] - 2 * len("  ")
    widths[1] = max(20, min(widths[1], room - widths[2]))
    lines: list[str] = []
    for number, row in enumerate(rows):
        lines += [headings[number]] if number in headings else []
        value_width = max(widths[1], min(len(row[1]), room - len(row[2])))  # an address stays whole where it can
        sizes = [widths[0], value_width, widths[2]]
        parts = _over_lines(row, sizes)
        lines += ["  ".join(cell.ljust(size) for cell, size in zip(part, sizes, strict=True)) for part in parts]
    return lines


def _kind(setting: Setting) -> str:
    return "recipe" if setting.origin.startswith("recipe ") else setting.origin
