"""`--without-nemo`: run tests as if NeMo, NeMo-Run and Lightning were not installed.

A test file that imports one of these packages at module level is skipped. A test that imports one of the
packages later, in a function, in a fixture or in a rank's process, is skipped too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


NEMO = ("nemo", "nemo_run", "lightning")


def hide_nemo() -> None:
    """Make every import of NeMo in this process fail, and hide NeMo from `find_spec`."""
    sys.modules.update(dict.fromkeys(NEMO))  # type: ignore[arg-type]


class WithoutNeMo:
    """The pytest hooks that skip tests which need NeMo."""

    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> pytest.Module:
        return _Module.from_parent(parent, path=module_path)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        with _skip_what_needs_nemo():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with _skip_what_needs_nemo():
            return (yield)


class _Module(pytest.Module):
    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        with _skip_what_needs_nemo():
            return super().collect()


@contextmanager
def _skip_what_needs_nemo() -> Iterator[None]:
    try:
        yield
    except (ModuleNotFoundError, pytest.Collector.CollectError) as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if not isinstance(missing, ModuleNotFoundError) or (missing.name or "").partition(".")[0] not in NEMO:
            raise
        pytest.skip(f"it imports {missing.name}", allow_module_level=True)
