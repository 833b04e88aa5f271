"""An error is data, and its text is made from the data."""

from __future__ import annotations

import pickle
import runpy
from pathlib import Path

import pytest

from nemo_upcycle.errors import CheckpointError, SpecError, UnfinishedError, UpcycleError, mistake_in_file


CHANGED = "2 files changed after it was built: a, b. Rebuild it."
TOP_K = SpecError(field="top_k", got="<9>", expected="1 to <num_experts> (8)", fix="set <top_k>=2.")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (CheckpointError("a <b>", got=None, expected=1, fix="see <c>."), "A <b> is None; expected 1. See <c>."),
        (TOP_K, "top_k is <9>; expected 1 to num_experts (8). Set top_k=2."),
        (SpecError.unknown("<m>", "copi", {"copy"}), "<m> 'copi' does not exist. Did you mean 'copy'? Valid: copy."),
        (UpcycleError("x", kind="missing", got="is not installed", fix="run: pip"), "x is not installed. Run: pip."),
        (UpcycleError("run x", kind="state", got="is full", fix="name another?"), "Run x is full. Name another?"),
        (UpcycleError("2 files", kind="changed", got="a, b", expected="it was built", fix="rebuild it"), CHANGED),
        (
            UpcycleError("--a", kind="refused", got="needs --b", expected="why", fix="add it"),
            "--a needs --b: why. Add it.",
        ),
        (UpcycleError("no recipe"), "no recipe"),
    ],
)
def test_each_kind_of_mistake_has_its_own_sentence(error: UpcycleError, text: str) -> None:
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == text


def test_a_missing_path_names_the_closest_one(tmp_path: Path) -> None:
    (tmp_path / "nose").mkdir()
    assert str(UpcycleError.no_path("folder", tmp_path / "nope")) == (
        f"No folder {tmp_path}/nope. Did you mean {tmp_path}/nose?"
    )
    assert str(UpcycleError.no_path("folder", tmp_path / "a/b")) == f"No folder {tmp_path}/a/b. Check the path."


def test_a_front_end_names_fields_as_its_user_typed_them() -> None:
    options = {"top_k": "--top-k", "num_experts": "--experts"}
    typed = TOP_K.renamed(lambda name: options[name])
    assert (type(typed), typed.field, typed.got) == (SpecError, "--top-k", "<9>")
    assert str(typed) == "--top-k is <9>; expected 1 to --experts (8). Set --top-k=2."
    assert str(TOP_K) == "top_k is <9>; expected 1 to num_experts (8). Set top_k=2."


def test_fields_in_the_rest_of_a_sentence_are_renamed() -> None:
    error = SpecError(field="calibration", kind="refused", got="needs <router_init>", fix="set <router_init>")
    assert str(error.renamed(lambda name: f"--{name}")) == "--calibration needs --router_init. Set --router_init."


def test_an_error_without_a_field_keeps_its_words() -> None:
    error = UnfinishedError("stage <data>", got="<x>", expected="<y>", fix="<z>")
    assert error.renamed(str.upper) is error
    assert str(error.within("mine.yaml")) == "mine.yaml: stage <data> is <x>; expected <y>. <z>."
    assert error.within("mine.yaml").exit_status == 1


def test_errors_together_stay_data_each_once() -> None:
    rate, steps = SpecError(field="lr", got=-1, expected="0 or more", fix="set <lr>"), UpcycleError("no steps")
    several = SpecError.together([SpecError.together([rate, steps]), rate])
    assert several.parts == (rate, steps)
    named = several.renamed(lambda name: f"optim.{name}").within("moe")
    assert str(named) == ("2 mistakes:\n  moe: optim.lr is -1; expected 0 or more. Set optim.lr.\n  moe: no steps")
    assert SpecError.together([rate, rate]) is rate


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("x = 1\ny = x + 'a'\n", 2, "TypeError: unsupported operand"),
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError: Expecting property name"),
        ("def f(:\n    pass\n", 1, "SyntaxError: invalid syntax"),
    ],
    ids=["its own", "of what it calls", "no Python"],
)
def test_an_error_of_a_users_file_has_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    """A library may wrap the error before it is reported."""
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises((Exception,)) as caught:
        runpy.run_path(str(file))
    of_library = RuntimeError("no factory")
    of_library.__cause__ = caught.value
    found = mistake_in_file(of_library)
    assert found is not None
    assert found.subject == f"{file}, line {line}"
    assert str(found.got).startswith(f"raises {what}")


def test_errors_in_python_itself_are_not_the_users() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        runpy.run_path("/nope.py")
    below = caught.value.with_traceback(caught.tb.tb_next)  # this file is not part of Python
    assert mistake_in_file(below) is None
