"""Let the tests meet wrong edits of the package: `python -m tests.mutants`."""

from tests.mutants.runner import main


if __name__ == "__main__":
    raise SystemExit(main())
