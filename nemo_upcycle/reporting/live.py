"""The report of a running chain: a page that is rewritten while the chain runs, and that reloads itself.

The pipeline starts this process to write the page:

    python -m nemo_upcycle.reporting.live RUN EVERY_S [PRICE_PER_GPU_HOUR]

The process ends on SIGTERM, or with the process that started it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.reporting import figures
from nemo_upcycle.reporting.html import render_html
from nemo_upcycle.reporting.markdown import number, section
from nemo_upcycle.reporting.opening import became, load_rows, parent_name, uneven
from nemo_upcycle.reporting.progress import (
    LAST,
    TRAININGS,
    Progress,
    StageState,
    read_progress,
    stage_states,
    steps_left_s,
)
from nemo_upcycle.reporting.results import summarise_curve
from nemo_upcycle.trainers.lineage import Branch
from nemo_upcycle.utils.files import whole_file
from nemo_upcycle.utils.masking import without_secrets
from nemo_upcycle.utils.progress import duration
from nemo_upcycle.utils.writers import plain, table


_TITLES = {"pretrain": "MoE", "dense_ct": "baseline"}
#: Seconds between two pages, and seconds after which a browser reloads the page.
EVERY_S, REFRESH_S = 120.0, 30
#: Seconds from the start of a stage to its second page, and seconds between two checks of the stages.
_SOON_S, _POLL_S = 10.0, 1.0
#: Pause after a page, as a multiple of the time to write the page. Reading the large files of a long run takes time.
_REST = 20


def watch(
    run_dir: Path, every_s: float = EVERY_S, price: float | None = None, is_told: Callable[[], bool] | None = None
) -> None:
    """Write the page whenever a stage starts or ends, and every few minutes, until the run has its report.

    Args:
        run_dir: folder of the run.
        every_s: seconds between two pages.
        price: price of one GPU for one hour; None omits the cost.
        is_told: function that returns whether to write a last page and end; if None, the process ends when the report
            exists.
    """
    shown, changed_s, last_s, took_s = None, 0.0, 0.0, 0.0
    while True:
        ends = is_told is not None and is_told()
        with suppress(UpcycleError, OSError):  # a file is being written; the next round will read it
            states = [(state.name, state.how) for state in stage_states(run_dir)]
            changed_s = changed_s if states == shown else time.monotonic()
            # The interval doubles with each page of a stage, up to `every_s`.
            wait_s = max(min(every_s, max(_SOON_S, last_s - changed_s)), _REST * took_s)
            if ends or states != shown or time.monotonic() - last_s >= wait_s:
                began_s, progress = time.monotonic(), read_progress(run_dir)
                if not progress.is_over:
                    write_page(run_dir, progress, price, is_last=ends)
                shown, last_s = states, time.monotonic()
                took_s = last_s - began_s
            ends |= is_told is None and states[-1:] == [(LAST, "done")]
        if ends:
            return
        time.sleep(_POLL_S)


def write_page(run_dir: Path, progress: Progress, price: float | None = None, *, is_last: bool = False) -> None:
    """Write `report.html` of a running chain; the last page says that it is the last, and does not reload itself."""
    curves = progress.curves
    images = {"loss.png": figures.png_of(figures.loss_figure(curves))} if curves else {}
    text = without_secrets(compose(run_dir, progress, price, is_last=is_last))
    page = render_html(text, images, 0 if is_last else REFRESH_S)
    with whole_file(run_dir / "report.html") as aside:
        aside.write_bytes(page.encode(errors="replace"))


def compose(run_dir: Path, progress: Progress, price: float | None = None, *, is_last: bool = False) -> str:
    """Return the page as Markdown.

    Args:
        run_dir: folder of the run; its name is the title.
        progress: progress of the run.
        price: price of one GPU for one hour; None omits the cost.
        is_last: whether this is the last page.
    """
    training = {stage: summarise_curve(curve) for stage, curve in progress.curves.items()}
    rows = [*_losses(progress), *_speeds(progress, training), *_cost(progress, price)]
    if "pretrain" in training:
        rows[2:2] = [["Load of the busiest expert now (1: balanced)", *row[1:]] for row in load_rows(training)]
    stages = [[state.name, state.how, _took(state)] for state in progress.stages]
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    again = "and rewritten at every stage and every few minutes. This page reloads itself"
    parts = [
        f"# {plain(run_dir.resolve().name)}",
        _becomes(progress),
        plain(_doing(progress, "Not finished" if is_last else "Running")),
        table(["", "so far", "for comparison"], rows, words=1) if rows else "",
        uneven(training["pretrain"]) if "pretrain" in training else "",
        *(plain(f"{stage}: {branch.describe()}") for stage, branch in _present_branches(progress)),
        "![loss over tokens](loss.png)" if progress.curves else "",
        f"Written {now}, {'for the last time' if is_last else again}.",
        section("Stages", table(["stage", "state", "time"], stages, words=2)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _present_branches(progress: Progress) -> list[tuple[str, Branch]]:
    """Return the present branch of each rewound training."""
    return [(stage, curve.branches[-1]) for stage, curve in progress.curves.items() if curve.branches]


def _becomes(progress: Progress) -> str:
    plan, receipt = progress.plan, progress.receipt
    if not receipt:
        return plain(f"{parent_name(plan['dense'])} → MoE, with the recipe {plan['recipe']}.")
    return plain(became(plan["dense"], receipt))


def _doing(progress: Progress, word: str) -> str:
    """Say which stages run, how far they are and when they end. If no stage runs, say how the last stage ended."""
    running = [_how_far(progress, state) for state in progress.stages if state.how == "running"]
    if running:
        return f"{word}: {'; '.join(running)}."
    if not progress.stages:
        return "No stage has started yet."
    last = progress.stages[-1]
    then = "and the next stage has not started" if last.how == "done" else "and the same command resumes it"
    return f"Nothing is running. Stage {last.name} is {last.how}, {then}."


def _how_far(progress: Progress, state: StageState) -> str:
    if state.name not in progress.curves:
        return f"{state.name}, since {datetime.fromtimestamp(state.begun_s):%H:%M:%S}"
    steps, most = progress.curves[state.name].steps, progress.settings[state.name]["max_steps"]
    left = duration(steps_left_s(steps, most))
    return f"{state.name}, step {steps[-1]['step']:,} of {most:,}, about {left} left in this stage"


def _took(state: StageState) -> str:
    return "-" if state.seconds is None else duration(state.seconds)


def _losses(progress: Progress) -> list[list[str]]:
    """Compare the last losses of the MoE, or of the baseline if there is no MoE, with all known losses."""
    curves = progress.curves
    if not curves:
        return []
    first, *others = (stage for stage in TRAININGS if stage in curves)
    last = curves[first].steps[-1]
    beside = [f"at step {curves[first].steps[0]['step']} {curves[first].steps[0]['loss']:.3f}"]
    for one in others:
        beside += [f"{_TITLES[one]} {line['loss']:.3f}" for line in curves[one].steps if line["step"] == last["step"]]
    title = f"{_TITLES[first]}, training loss at step {last['step']:,}"
    return [*_validation(progress, first, others), [title, f"{last['loss']:.3f}", ", ".join(beside)]]


def _validation(progress: Progress, first: str, others: list[str]) -> list[list[str]]:
    """Compare the last validation loss with the parent's loss and the baseline's loss after equally many tokens."""
    losses = {stage: dict(curve.validation) for stage, curve in progress.curves.items()}
    if not (tokens := max(losses[first], default=0)):
        return []
    tokens = max((at for at in losses[first] if at and all(at in losses[one] for one in others)), default=tokens)
    beside = {_TITLES[one]: losses[one].get(tokens) for one in others}
    is_equal = bool((progress.receipt or {}).get("within_tolerance"))
    for stage, name in (("pretrain", "parent" if is_equal else "at step 0"), ("dense_ct", "parent")):
        if 0 in losses.get(stage, {}):  # the baseline starts as the parent; the MoE equals the parent if it is exact
            beside = {name: losses[stage][0], **beside}
    known = ", ".join(f"{title} {loss:.3f}" for title, loss in beside.items() if loss is not None)
    title = f"{_TITLES[first]}, validation loss after {tokens:,} tokens"
    return [[title, f"{losses[first][tokens]:.3f}", known or "-"]]


def _speeds(progress: Progress, training: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"tokens per second, {stage}",
            number(done["tokens_per_s"]),
            f"{progress.settings[stage]['ranks']} ranks, {progress.settings[stage].get('card') or 'CPU'}",
        ]
        for stage, done in training.items()
    ]


def _cost(progress: Progress, price: float | None) -> list[list[str]]:
    """Compute the GPU-hours of the trainings, and their cost if a price is known."""
    ranks = {stage: settings["ranks"] for stage, settings in progress.settings.items()}
    hours = sum((state.seconds or 0) / 3600 * ranks.get(state.name, 0) for state in progress.stages)
    if not hours:
        return []
    cost = "no price given" if price is None else f"{hours * price:,.2f} at {price:g} per hour"
    return [["rank-hours of the trainings", number(hours, 3), cost]]


def _main(run_dir: str, every_s: str, price: str = "") -> None:
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent process
    parent = os.getppid()
    os.nice(10)
    watch(
        Path(run_dir),
        float(every_s),
        float(price) if price else None,
        lambda: bool(told) or os.getppid() != parent,
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
