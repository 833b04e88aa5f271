"""The start of the program `nemo-upcycle`: Ctrl-C ends it without a traceback, also while it imports."""

from __future__ import annotations

import signal


def main() -> int:
    """Run the command line; return the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `cli.main` has a word for it
    from nemo_upcycle.cli.main import main as run

    return run()
