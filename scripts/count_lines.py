"""Print the number of code lines of each room and of its tests, without docstrings, blank lines and comments.

    .venv/bin/python scripts/count_lines.py

A room is a folder in nemo_upcycle/, or the folder recipes/. Its tests are in tests/unit/ROOM. All other tests share a
row.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count_lines(text: str) -> int:
    """Count the lines that contain code.

    Example:
        >>> count_lines('\\"\\"\\"Doc.\\"\\"\\"\\n\\nx = (\\n    1\\n)  # a comment\\n')
        3
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
    docstrings = {line for node in nodes for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in _NO_CODE]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


def main() -> None:
    """Count the lines, and print one row per room."""
    code: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for folder, counts in (("nemo_upcycle", code), ("recipes", code), ("tests", tests)):
        for path in (ROOT / folder).rglob("*.py"):
            first, *rest = path.relative_to(ROOT).parts[:-1]
            room = (rest or [first])[0] if counts is code else rest[1] if rest[:1] == ["unit"] and rest[1:] else ""
            counts[room] += count_lines(path.read_text(encoding="utf-8"))
    other = sum(count for room, count in tests.items() if room not in code)
    rows = [f"{'lines of code':<16}{'package':>8}{'tests':>8}"]
    rows += [f"{room:<16}{count:>8,}{tests[room]:>8,}" for room, count in code.most_common()]
    rows += [f"{'other tests':<16}{other:>16,}", f"{'together':<16}{sum(code.values()):>8,}{sum(tests.values()):>8,}"]
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
