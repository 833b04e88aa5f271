r"""Write users' text into Python, YAML and Markdown, always as a quoted value.

The functions below write every file of these formats. `files.write_json` writes JSON, `command_line.CommandLine`
writes commands, and `reporting.html.render_html` writes HTML.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml


#: Characters with a meaning in Markdown or its tables. An underscore inside a word has no meaning.
_SPECIAL = re.compile(r"[\\`*\[\]<>|#$&~]|(?<![^\W_])_|_(?![^\W_])")
#: A `|` that ends a table's cell in Markdown.
_CELL_END = re.compile(r"(?<!\\)\|")
#: Characters that change the order in which text is displayed.
_REORDERING = "\\u202a-\\u202e\\u2066-\\u2069"
#: Reordering characters, and control characters of terminals.
_CONTROL = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{_REORDERING}]")
#: Characters that YAML must escape: reordering characters, and line ends that PyYAML writes raw and reads as blanks.
_ESCAPED = re.compile(rf"[{_REORDERING}\x85\u2028\u2029\ufeff]")
#: Text that Python and OmegaConf read as a number, and PyYAML reads as text.
EXPONENT = re.compile(r"[-+]?[\d_.]*\d[\d_.]*[eE][-+]?\d+")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Code(str):
    """Python source; `python_code` does not quote it again."""


def python_code(template: str, **values: object) -> str:
    r"""Fill a Python template; write each value as a literal.

    Args:
        template: Python with `{name}` in place of each value.
        values: strings, numbers and other literals; a `Code` is inserted unchanged.

    Raises:
        ValueError: a value cannot be written as a literal.

    Example:
        >>> python_code("TITLE = {title}", title='a"; print()')
        'TITLE = \'a"; print()\''
    """
    return template.format(
        **{name: value if isinstance(value, Code) else literal(value) for name, value in values.items()}
    )


def literal(value: object) -> Code:
    r"""Return a value as a Python literal; escape characters that cannot be displayed.

    Raises:
        ValueError: the literal would not give the same value.

    Example:
        >>> literal(["it's", 2])
        '["it\'s", 2]'
    """
    text = repr(value)
    if ast.literal_eval(text) != value:
        raise ValueError(text)
    return Code(text)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """YAML dumper that also quotes texts which only OmegaConf reads as numbers."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, [*"-+.0123456789"])


def yaml_text(value: Any, width: int = 80) -> str:
    """Return plain values as YAML, and keep the order of the keys.

    Args:
        value: mappings, lists, texts, numbers.
        width: line width after which a line is folded (characters).

    Example:
        >>> yaml_text({"license": "# none"})
        "license: '# none'\\n"
    """

    def dump(shown: bool) -> str:
        return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=shown, width=width))

    text = dump(True)
    return dump(False) if _ESCAPED.search(text) else text


class Markdown(str):
    """Text in Markdown, as `plain` and `code` return it; `table` does not escape it again."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 0) -> str:
    """Return a Markdown table that shows each cell's text unchanged; align the first column left, the others right.

    Args:
        header: titles of the columns.
        rows: cells of each row.
        words: number of columns at the end that contain words and are aligned left.

    Example:
        >>> print(table(["stage", "s"], [["import", "3"]]))
        | stage | s |
        |---|---:|
        | import | 3 |
    """
    numbers = len(header) - 1 - words
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    title, *below = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([title, f"|{'|'.join(['---', *['---:'] * numbers, *['---'] * words])}|", *below])


def _cell(text: str) -> str:
    return _CELL_END.sub(r"\|", text) if isinstance(text, Markdown) else plain(text)


def plain(text: object) -> Markdown:
    """Return a value on one line, escaped so that Markdown shows its text unchanged, also inside a table.

    All text from files and names of runs must pass through this function, `code` or `fenced`. `table` calls `plain`
    itself.

    Example:
        >>> print(plain("one | <b>two</b>\\n*three* of my_task"))
        one \\| \\<b\\>two\\</b\\> \\*three\\* of my_task
    """
    return Markdown(_SPECIAL.sub(r"\\\g<0>", _one_line(text)))


def code(text: object) -> Markdown:
    """Return any value as inline code.

    Example:
        >>> print(code("model"), code("a`b"))
        `model` `` a`b ``
    """
    line = _one_line(text)
    ticks = "`" * (1 + _longest_ticks(line))
    return Markdown(f"{ticks}{line}{ticks}" if len(ticks) == 1 else f"{ticks} {line} {ticks}")


def fenced(text: str, language: str) -> str:
    """Return lines as a fenced code block whose fence is longer than any sequence of backticks in the text.

    Example:
        >>> print(fenced("ls", "bash"))
        ```bash
        ls
        ```
    """
    ticks = "`" * max(3, 1 + _longest_ticks(text))
    return f"{ticks}{language}\n{_CONTROL.sub(_UNKNOWN, text)}\n{ticks}"


def _one_line(text: object) -> str:
    return _CONTROL.sub(_UNKNOWN, " ".join(str(text).split()))


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
