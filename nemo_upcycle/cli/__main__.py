"""Run `nemo-upcycle` as `python -m nemo_upcycle.cli`, if the program is not on PATH."""

import sys

from nemo_upcycle.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
