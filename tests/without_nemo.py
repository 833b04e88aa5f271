"""`--without-nemo`, for `make check`: NeMo, NeMo-Run and Lightning are as if they were not installed.

A test file that imports one of them as it is imported, itself or through modules of this repository, is not collected:
that is read from the sources. Where a test comes to import one later, in a function, a fixture or on ranks, it is
skipped.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
NEMO = ("nemo", "nemo_run", "lightning")
#: Code that a test gives to `python -c` or writes to a file.
_CODE = re.compile(rf"^\s*(?:from|import) ({'|'.join(NEMO)})\b", re.MULTILINE)


def hide_nemo() -> None:
    """Let every import of NeMo in this process fail, and `find_spec` find nothing."""
    sys.modules.update(dict.fromkeys(NEMO))  # type: ignore[arg-type]


class WithoutNeMo:
    """The hooks of pytest."""

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return True if collection_path.match("test_*.py") and imports_nemo(collection_path) else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        with _skip_what_needs_nemo():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        with _skip_what_needs_nemo():
            return (yield)


@contextmanager
def _skip_what_needs_nemo() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEMO:
            raise
        pytest.skip(f"it imports {error.name}")


def imports_nemo(path: Path) -> bool:
    """Return whether importing a file imports NeMo, itself or through modules of this repository."""
    seen = [path]
    for file in seen:
        for name in _imported(file):
            if name.partition(".")[0] in NEMO:
                return True
            seen += [found for found in _files(name) if found not in seen]
    return False


@cache
def _imported(path: Path) -> frozenset[str]:
    """Return the dotted names that a file imports outside its functions, and NeMo's where code in its texts does."""
    names: set[str] = set()
    ahead: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while ahead:
        node, is_later = ahead.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(_CODE.findall(node.value))
        elif isinstance(node, ast.Import) and not is_later:
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not is_later:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        is_later = is_later or isinstance(node, ast.FunctionDef)
        ahead += [(child, is_later) for child in ast.iter_child_nodes(node)]
    return frozenset(names)


@cache
def _files(name: str) -> list[Path]:
    """Return the files of this repository that importing a dotted name runs."""
    parts = name.split(".")
    modules = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    paths = [ROOT / module.replace("nemo_upcycle/recipes", "recipes") for module in modules]
    return [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
