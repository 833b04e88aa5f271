"""Check that every mutant is one edit of the package. `python -m tests.mutants` checks that tests notice the edits."""

from __future__ import annotations

import ast
import re

import pytest

from tests.mutants.runner import LIST, ROOT, Mutant, kill, read_mutants


MUTANTS = read_mutants()


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=lambda mutant: mutant.name)
def test_mutant_changes_what_its_file_does(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutant.applied(text))) != ast.dump(ast.parse(text))
    assert mutant.breaks.endswith(".")
    assert mutant.tests
    for file in mutant.tests:
        assert file.startswith("tests/")
        assert (ROOT / file).is_file(), file


def test_no_two_mutants_have_one_name() -> None:
    names = re.findall(r"^(\w+):", LIST.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert names == list(MUTANTS)


@pytest.mark.parametrize("text", ["a = 1\n", "a = 2\na = 2\n"])
def test_an_edit_needs_a_text_that_occurs_once(text: str) -> None:
    with pytest.raises(ValueError, match=r"occurs \d times in a\.py; expected once"):
        Mutant("name", "a.py", "a = 2", "a = 3", "", []).applied(text)


@pytest.mark.full
def test_a_known_mutant_is_killed_by_its_test() -> None:
    killer = kill(MUTANTS["secrets_in_small_letters_shown"])
    assert killer.startswith("FAILED tests/unit/utils/test_masking.py::test_names_of_secrets[my_token]")
