"""`nemo-upcycle report`: write report.md, report.html and plots of a run, or the table and figures of a grid."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from nemo_upcycle.cli.common import show


EPILOG = """examples:
  nemo-upcycle report runs/demo
  nemo-upcycle report runs/demo --watch       a running run: rewrites report.html until it ends
  nemo-upcycle report runs/laptop             a grid: its table and figures
  nemo-upcycle report results/laptop          a grid's evidence.json.gz: rewrites laptop.md beside it

exit status: 0 done; 2 results of a stage are missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a pipeline run, of a grid, or of its evidence"
    )
    parser.add_argument(
        "--watch", action="store_true", help="rewrite report.html while the run continues; opens no port"
    )
    help_price = "with --watch: price in your currency, to show the cost so far"
    parser.add_argument("--price-per-gpu-hour", metavar="PRICE", type=float, help=help_price)


def run(args: argparse.Namespace) -> int:
    """Write the report, show its path, and return the exit status.

    Raises:
        UpcycleError: an input is missing or damaged.
    """
    from nemo_upcycle.reporting.grid_table import is_grid, write_grid
    from nemo_upcycle.reporting.report import write_report

    if args.watch:
        return _watch(args)
    if is_grid(args.run):
        table = write_grid(args.run)
        show(args, {"table": table}, str(table))
        return 0
    path = write_report(args.run)
    show(args, {"report": path, "results": path.with_name("results.json")}, str(path))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from nemo_upcycle.reporting.live import watch
    from nemo_upcycle.reporting.run_folder import require_run

    require_run(args.run)
    page = args.run / "report.html"
    sys.stderr.write(f"{page}: open it in a browser; it reloads itself. Ctrl-C ends this, and nothing else.\n")
    with suppress(KeyboardInterrupt):
        watch(args.run, price=args.price_per_gpu_hour)
    show(args, {"report": page}, str(page))
    return 0
