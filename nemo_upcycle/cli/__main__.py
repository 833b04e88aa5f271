"""`python -m nemo_upcycle.cli`: the same as `nemo-upcycle`, if that program is not on PATH."""

import sys

from nemo_upcycle.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
