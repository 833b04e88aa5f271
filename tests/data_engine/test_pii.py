"""Personal addresses and numbers are replaced only in sources that ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_engine.blend import write_jsonl, write_plan
from tests.data_engine.runs import execute, stats, texts


KINDS = ["email", "ip", "card", "ssn"]
#: Text, the same text with replacements, and number of replacements by kind.
CASES = [
    ("Write to jane.doe+x@mail.example.co.uk.", "Write to email@example.com.", {"email": 1}),
    ("from 8.8.8.8 and 1.1.1.1, not 192.168.0.1", "from 192.0.2.1 and 192.0.2.1, not 192.168.0.1", {"ip": 2}),
    ("card 4111 1111 1111 1111 ok", "card 0000 0000 0000 0000 ok", {"card": 1}),
    ("5555-5555-5555-4444 and 378282246310005", "0000 0000 0000 0000 and 0000 0000 0000 0000", {"card": 2}),
    ("SSN 123-45-6789.", "SSN 000-00-0000.", {"ssn": 1}),
]
CLEAN = [
    "no card: 4111 1111 1111 1112",
    "a row 14111111111111111 of digits",
    "pi 3.4111111111111111, -4111111111111111",
    "not given: 000-12-3456 666-12-3456 912-34-5678 123-00-4567 123-45-0000",
    "a telephone 123-45-67890 and 1-123-45-6789",
    "version 4.4.4 of pkg@latest",
]


def _run(folder: Path, kinds: list[str]) -> tuple[list[str], dict[str, int]]:
    file = write_jsonl(folder / "1.jsonl", *(text for text, _, _ in CASES), *CLEAN)
    work = execute(write_plan(folder, [{"files": [file], "pii": kinds}]))
    return texts(work), stats(work)["pii"]


def test_what_a_source_names_is_replaced_and_counted(tmp_path: Path) -> None:
    kept, counts = _run(tmp_path, KINDS)
    assert kept == [*(wanted for _, wanted, _ in CASES), *CLEAN]
    assert counts == {"email": 1, "ip": 2, "card": 3, "ssn": 1}


@pytest.mark.parametrize("kinds", [[], ["ssn"]])
def test_what_no_source_names_stays(tmp_path: Path, kinds: list[str]) -> None:
    kept, counts = _run(tmp_path, kinds)
    assert kept == [*(wanted if [*made] == kinds else text for text, wanted, made in CASES), *CLEAN]
    assert counts == dict.fromkeys(kinds, 1)
