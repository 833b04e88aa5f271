"""The entry point of the program `nemo-upcycle`. Ctrl-C ends the program without a traceback, even during imports."""

from __future__ import annotations

import signal


def main() -> int:
    """Run the command line, and return the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends silently until `cli.main` handles it
    from nemo_upcycle.cli.main import main as run

    return run()
