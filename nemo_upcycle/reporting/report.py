"""`write_report`: write report.md, results.json and two figures into a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.reporting import evaluation_sections, sections, training_sections
from nemo_upcycle.reporting.environment import describe_environment
from nemo_upcycle.reporting.figures import load_figure, loss_figure
from nemo_upcycle.reporting.results import collect_results
from nemo_upcycle.reporting.run_folder import read_run
from nemo_upcycle.utils.files import whole_file, write_json


_DPI = 150


def write_report(run_dir: Path) -> Path:
    """Write `report.md`, `results.json`, `loss.png` and `experts.png` into a run's folder.

    Args:
        run_dir: the folder, with the results of the stages upcycle, pretrain, dense_ct (optional) and evaluate.

    Returns:
        The path of `report.md`, which is written last.

    Raises:
        UpcycleError: an input is missing or damaged; the message names the stage that writes it.

    Example:
        >>> write_report(Path("runs/demo"))  # doctest: +SKIP
        PosixPath('runs/demo/report.md')
    """
    run = read_run(run_dir)
    results = collect_results(run, describe_environment())
    figures = {"loss.png": loss_figure(run.curves), "experts.png": load_figure(run.curves["pretrain"])}
    for name, figure in figures.items():
        if figure is not None:
            with whole_file(run_dir / name) as aside:
                figure.savefig(aside, dpi=_DPI, format="png")
    write_json(run_dir / "results.json", results)
    target = run_dir / "report.md"
    with whole_file(target) as aside:
        aside.write_text(compose(results, run_dir), encoding="utf-8")
    return target


def compose(results: dict[str, Any], run_dir: Path) -> str:
    """Return the text of the report.

    Args:
        results: what `collect_results` returned.
        run_dir: the run's folder, for its name and the commands.
    """
    parts = [
        f"# {run_dir.resolve().name}",
        sections.summary(results),
        sections.command(results),
        evaluation_sections.evaluation(results),
        evaluation_sections.samples(results),
        evaluation_sections.step_zero(results),
        training_sections.training(results),
        training_sections.expert_load(results),
        sections.receipt(results),
        sections.setting(results),
        sections.next_steps(results, run_dir),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
