"""`nemo-upcycle report`: write report.md, report.html and plots into a run's folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_upcycle.cli.common import add_json, show


HELP = "run folder -> report.md, report.html, results.json and plots"
_EXAMPLES = """example:
  nemo-upcycle report runs/demo

exit status: 0 done; 2 the folder lacks a stage's results."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = _EXAMPLES
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a pipeline run")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the report, show its path, and return the exit status.

    Raises:
        UpcycleError: an input is missing or damaged.
    """
    from nemo_upcycle.reporting.report import write_report

    path = write_report(args.run)
    show(args, {"report": path, "results": path.with_name("results.json")}, str(path))
    return 0
