"""The picture of a demo's losses, for docs/verified.md: `make demo && python -m benchmarks.demo_picture`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_upcycle.reporting.figures import loss_figure
from nemo_upcycle.reporting.run_folder import read_run


def main() -> None:
    """Draw it from a finished demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="folder of the demo")
    run = read_run(parser.parse_args().run)
    loss_figure(run.curves).savefig(Path(__file__).parents[1] / "docs/demo.png", dpi=110)


if __name__ == "__main__":
    main()
