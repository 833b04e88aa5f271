"""Try wrong edits of the package against the tests: `python -m tests.mutants`."""

from tests.mutants.runner import main


if __name__ == "__main__":
    raise SystemExit(main())
