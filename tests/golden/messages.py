"""Render every message of the package as users see it, from the source code that raises the message.

The words come from the source. A value that is known only at run time is shown as a Python expression in braces.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import nemo_upcycle
from nemo_upcycle import errors
from nemo_upcycle.data.suites.lm_eval_tasks import TaskDataError
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import UnreachableError
from nemo_upcycle.sources.checks import BrokenWeights
from nemo_upcycle.spec import UpcycleSpec
from tests.golden import FOLDER


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, UpcycleError)


MESSAGES = FOLDER / "messages.txt"
PACKAGE = Path(nemo_upcycle.__file__).parent
_OTHERS = (BrokenWeights, TaskDataError, UnreachableError)
_CLASSES = {kind.__name__: kind for kind in (*vars(errors).values(), *_OTHERS) if _is_error(kind)}
_SPEC = {field.name for field in dataclasses.fields(UpcycleSpec)}
#: Maximum length of an expression (characters).
_LONGEST = 60


def messages_text() -> str:
    """Return all messages, file by file, each with its kind and the function that raises it.

    A message about a field of the spec appears three times: with the field's name in Python, with the option of
    `nemo-upcycle`, and with the setting's name in a stage and the report.
    """
    lines = [
        "All messages, made by `python -m tests.golden`: in Python, then on the command line and in a stage, if other."
    ]
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.with_name("recipes").glob("*.py")]):
        found = [line for call, function in _calls(path) for line in _lines(call, function)]
        if found:
            lines += ["", str(path.relative_to(PACKAGE.parent)), *found]
    return "\n".join(lines) + "\n"


def _calls(path: Path) -> Iterator[tuple[ast.Call, ast.FunctionDef | ast.Module]]:
    """Yield the calls in a file that create errors, each with the function that contains the call."""

    def below(
        node: ast.AST, function: ast.FunctionDef | ast.Module
    ) -> Iterator[tuple[ast.Call, ast.FunctionDef | ast.Module]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and _class_and_maker(child)[0] in _CLASSES:
                yield child, function
            yield from below(child, child if isinstance(child, ast.FunctionDef) else function)

    if path != PACKAGE / "errors.py":
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from below(tree, tree)


def _class_and_maker(call: ast.Call) -> tuple[str, str]:
    """Return the error class that a call uses, and the class method ("" if the call uses the constructor)."""
    name = ast.unparse(call.func)
    return name.partition(".")[0], name.partition(".")[2]


def _lines(call: ast.Call, function: ast.FunctionDef | ast.Module) -> Iterator[str]:
    name, maker = _class_and_maker(call)
    if maker == "together":  # joins messages that other calls make
        return
    values = {one.arg: _text(one.value, function, call) for one in call.keywords if one.arg}
    given = [_text(value, function, call) for value in call.args]
    if maker == "unknown":
        given[2:] = [[given[2]]]  # type: ignore[list-item] # the valid names
    error = (
        getattr(_CLASSES[name], maker or "__call__")(*given, **values) if maker else _CLASSES[name](*given, **values)
    )
    where = "module" if isinstance(function, ast.Module) else function.name
    yield f"  {where} [{error.kind if error.fix or maker else 'text'}]"
    texts = [str(error)]
    if error.field in _SPEC:
        texts.append(f"error: {error.renamed(_option)}")
    if error.field in _SPEC or error.field.startswith("model.config."):
        texts.append(str(error.renamed(_setting)))
    for text in texts:
        yield from (f"    {line}" for line in text.splitlines())


def _option(field: str) -> str:
    return "--" + field.removeprefix("num_").replace("_", "-")


def _setting(field: str) -> str:
    return f"pretrain.{field}" if "." in field else f"pretrain.resume.restore_config.spec.{field}"


def _text(value: ast.expr, function: ast.AST, call: ast.Call) -> str:
    """Return the words of an expression.

    A local name stands for the text that was assigned to the name last, a conditional expression for its first text.
    """
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in value.values]
        return "".join(
            _text(part, function, call) if isinstance(part, ast.Constant) else _braced(part) for part in parts
        )
    if isinstance(value, ast.IfExp):
        return _text(value.body, function, call)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _text(value.left, function, call) + _text(value.right, function, call)
    if isinstance(value, ast.Name) and (given := _given(value.id, function, call)):
        return _text(given, ast.Module([], []), call)
    return _braced(value)


def _given(name: str, function: ast.AST, call: ast.Call) -> ast.expr | None:
    """Return the last value assigned to a name before a call, or None if the value is not a text expression."""
    found = None
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and node.lineno < call.lineno:
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for one, value in pairs:
                    is_later = found is None or value.lineno >= found.lineno
                    if isinstance(one, ast.Name) and one.id == name and is_later:
                        found = value
    return found if isinstance(found, ast.Constant | ast.JoinedStr | ast.IfExp | ast.BinOp) else None


def _braced(value: ast.expr) -> str:
    text = " ".join(ast.unparse(value).split())
    return "{" + (text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "...") + "}"
