"""Every mutant is one edit of the package as it is now; that tests notice them is for `python -m tests.mutants`."""

from __future__ import annotations

import argparse
import ast
import re

import pytest

from tests.mutants.runner import LIST, ROOT, Mutant, chosen, first_failure, kill, read_mutants


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
def test_edit_of_a_text_that_does_not_occur_once_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"occurs \d times in a\.py, expected once"):
        Mutant("name", "a.py", "a = 2", "a = 3", "", []).applied(text)


def test_same_seed_takes_the_same_sample() -> None:
    def sample(seed: int) -> list[Mutant]:
        return chosen(argparse.Namespace(names=[], sample=5, seed=seed))

    assert len(set(map(id, sample(0)))) == 5
    assert [mutant.name for mutant in sample(0)] == [mutant.name for mutant in sample(0)]
    assert [mutant.name for mutant in sample(0)] != [mutant.name for mutant in sample(1)]


def test_unknown_mutant_is_told_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no mutant jackknife_of_one_sed .*Did you mean 'jackknife_of_one_seed'"):
        chosen(argparse.Namespace(names=["jackknife_of_one_sed"], sample=None, seed=0))


def test_first_failing_test_is_read_from_what_pytest_prints() -> None:
    printed = "..F\nE   FAILED\nFAILED tests/a.py::test_b[c d] - assert 1 == 2\nFAILED tests/a.py::test_e\n1 failed\n"
    assert first_failure(printed) == "tests/a.py::test_b[c d]"
    assert first_failure("1 passed") == ""


@pytest.mark.full
def test_known_mutant_is_killed_by_the_test_that_is_about_it() -> None:
    killer = kill(MUTANTS["secrets_in_small_letters_shown"])
    assert killer == "tests/unit/utils/test_masking.py::test_names_of_secrets[my_token]"
