"""The report of a finished run: report.md, report.html, results.json and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.convert.model_card import add_section
from nemo_upcycle.reporting import evaluation_sections, figures, sections
from nemo_upcycle.reporting.environment import describe_environment
from nemo_upcycle.reporting.html import render_html
from nemo_upcycle.reporting.opening import opening
from nemo_upcycle.reporting.results import collect_results
from nemo_upcycle.reporting.run_folder import read_run
from nemo_upcycle.utils.files import read_json, whole_file, write_json
from nemo_upcycle.utils.masking import without_secrets
from nemo_upcycle.utils.writers import plain


def write_report(run_dir: Path, planned: Mapping[str, dict[str, float]] | None = None) -> Path:
    """Write the report of a run into its folder, and the scores into its model cards.

    The report consists of `report.md`, `report.html`, `results.json` and the figures.

    Args:
        run_dir: folder with the results of the stages upcycle, pretrain, dense_ct (optional) and evaluate.
        planned: training stage -> planned `memory_gib` and `tokens_per_s`, if the planner has these values; None keeps
            the numbers of an earlier report.

    Returns:
        The path of `report.md`, which is written last.

    Raises:
        UpcycleError: an input is missing or damaged; the message names the stage that writes this input.

    Example:
        >>> write_report(Path("runs/demo"))  # doctest: +SKIP
        PosixPath('runs/demo/report.md')
    """
    run = read_run(run_dir)
    results = collect_results(run, describe_environment())
    for stage, plan in (_planned_before(run_dir) if planned is None else planned).items():
        results["training"][stage]["planned"] = plan
    flops_per_token = {stage: settings["flops_per_token"]["full"] for stage, settings in run.settings.items()}
    drawn = {
        "loss": figures.loss_figure(run.curves),
        "loss_flops": figures.loss_figure(run.curves, flops_per_token),
        "heldout": figures.heldout_figure(run.curves),
        "experts": figures.load_figure(run.curves["pretrain"]),
        "routers": figures.routers_figure(run.curves["pretrain"]),
    }
    images = {f"{name}.png": figures.png_of(figure) for name, figure in drawn.items() if figure is not None}
    results["figures"] = [name for name, figure in drawn.items() if figure is not None]
    results = without_secrets(results)
    write_json(run_dir / "results.json", results)
    text, target = compose(results, run_dir), run_dir / "report.md"
    # The texts of models may contain half of a surrogate pair. Replace such a half, because it cannot be encoded.
    pages = {"report.html": render_html(text, images), target.name: text}
    for name, content in (images | {name: page.encode(errors="replace") for name, page in pages.items()}).items():
        with whole_file(run_dir / name) as aside:
            aside.write_bytes(content)
    for folder in (run_dir / "hf", run_dir / "dense_ct/hf"):  # export wrote these cards before there were scores
        add_section(folder, "Scores", evaluation_sections.scores(results))
    return target


def _planned_before(run_dir: Path) -> dict[str, dict[str, float]]:
    path = run_dir / "results.json"
    training = read_json(path)["training"] if path.is_file() else {}
    return {stage: done["planned"] for stage, done in training.items() if "planned" in done}


def compose(results: dict[str, Any], run_dir: Path) -> str:
    """Return the text of the report.

    Args:
        results: result of `collect_results`.
        run_dir: folder of the run, for the title and the commands.
    """
    parts = [
        f"# {plain(run_dir.resolve().name)}",
        opening(results),
        sections.command(results),
        evaluation_sections.evaluation(results),
        evaluation_sections.samples(results),
        evaluation_sections.step_zero(results),
        sections.training(results),
        sections.expert_load(results),
        sections.receipt(results),
        sections.what_ran_on_what(results),
        sections.next_steps(results, run_dir),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
