r"""Write text that a user gives into Python, YAML and Markdown, always as a quoted value.

Every file of these formats is written by the functions below. JSON is written by `files.write_json`, a command by
`command_line.CommandLine`, and HTML by `reporting.html.render_html`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml


#: Characters with a meaning in Markdown or its tables; an underscore inside a word has none.
_SPECIAL = re.compile(r"[\\`*\[\]<>|#$&~]|(?<![^\W_])_|_(?![^\W_])")
#: A `|` in Markdown that would end a table's cell.
_CELL_END = re.compile(r"(?<!\\)\|")
#: Characters that show the text around them in another order.
_REORDERING = "\\u202a-\\u202e\\u2066-\\u2069"
#: These, and what a terminal obeys.
_CONTROL = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{_REORDERING}]")
#: What YAML shows as an escape: these, and line ends that PyYAML writes raw and reads as blanks.
_ESCAPED = re.compile(rf"[{_REORDERING}\x85\u2028\u2029\ufeff]")
#: A number that Python and OmegaConf read, and PyYAML takes for a text.
EXPONENT = re.compile(r"[-+]?[\d_.]*\d[\d_.]*[eE][-+]?\d+")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Code(str):
    """Text that is Python already: `python_code` does not quote it again."""


def python_code(template: str, **values: object) -> str:
    r"""Fill a template of Python; each value is written as a literal.

    Args:
        template: Python with `{name}` where a value belongs.
        values: strings, numbers and other literals; a `Code` is written as it is.

    Raises:
        ValueError: a value has no literal.

    Example:
        >>> python_code("TITLE = {title}", title='a"; print()')
        'TITLE = \'a"; print()\''
    """
    return template.format(
        **{name: value if isinstance(value, Code) else literal(value) for name, value in values.items()}
    )


def literal(value: object) -> Code:
    r"""Return a value as a literal of Python, in ASCII if it has characters that do not show.

    Raises:
        ValueError: Python would read another value, or none.

    Example:
        >>> literal(["it's", 2])
        '["it\'s", 2]'
    """
    text = repr(value)
    if ast.literal_eval(text) != value:
        raise ValueError(text)
    return Code(text)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes texts that OmegaConf reads as numbers, and PyYAML does not."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, [*"-+.0123456789"])


def yaml_text(value: Any, width: int = 80) -> str:
    """Return plain values as YAML, with the keys in their order.

    Args:
        value: mappings, lists, texts, numbers.
        width: characters after which a line is folded.

    Example:
        >>> yaml_text({"license": "# none"})
        "license: '# none'\\n"
    """

    def dump(shown: bool) -> str:
        return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=shown, width=width))

    text = dump(True)
    return dump(False) if _ESCAPED.search(text) else text


class Markdown(str):
    """Text that is Markdown already, as `plain` and `code` return it: `table` does not escape it again."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 0) -> str:
    """Return a Markdown table of cells that are shown as they are: the first column aligned left, the others right.

    Args:
        header: titles of the columns.
        rows: cells of the rows.
        words: number of columns at the end that hold words, which are aligned left.

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
    """Return a value on one line, escaped so that Markdown shows it as it is, also inside a table.

    Whatever comes from a file or a name of a run goes through this, `code` or `fenced`; `table` does so by itself.

    Example:
        >>> print(plain("one | <b>two</b>\\n*three* of my_task"))
        one \\| \\<b\\>two\\</b\\> \\*three\\* of my_task
    """
    return Markdown(_SPECIAL.sub(r"\\\g<0>", _one_line(text)))


def code(text: object) -> Markdown:
    """Return a value as code inside a line, whatever it holds.

    Example:
        >>> print(code("model"), code("a`b"))
        `model` `` a`b ``
    """
    line = _one_line(text)
    ticks = "`" * (1 + _longest_ticks(line))
    return Markdown(f"{ticks}{line}{ticks}" if len(ticks) == 1 else f"{ticks} {line} {ticks}")


def fenced(text: str, language: str) -> str:
    """Return lines as a block of code that nothing in them ends.

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
