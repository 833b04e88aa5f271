"""A finished folder is reused only for the same inputs; differences in settings and files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.made_from import changes_text, require_same
from nemo_upcycle.errors import UpcycleError


NOTED: dict[str, Any] = {"format": 1, "chat": {"seed": 1, "files": ["a"]}, "files": [["/a", 3, 7]], "strict": False}
BLEND: dict[str, Any] = {"format": 2, "blend": {"seed": 1}, "strict": False}


@pytest.mark.parametrize(
    ("earlier", "got"),
    [
        (NOTED | {"chat": {"seed": 2, "files": ["a"]}}, "another chat's (seed differ)"),
        (NOTED | {"strict": True}, "another chat's (strict differ)"),
        (NOTED | {"files": [["/a", 4, 8]]}, "another chat's (since data was made 1 is changed (/a))"),
        (NOTED | {"format": 0}, 0),
        (BLEND, "files that are not ours"),
    ],
)
def test_what_differs_is_named(earlier: dict[str, Any], got: object) -> None:
    require_same(Path("data"), "chat", NOTED, NOTED)
    with pytest.raises(UpcycleError) as caught:
        require_same(Path("data"), "chat", earlier, NOTED)
    assert caught.value.got == got


def test_of_many_files_the_first_ones_are_named() -> None:
    text = changes_text({"new": list("abcde"), "gone": ["f"]}, Path("data"))
    assert text == "since data was made 5 files are new (a, b, c, and 2 more), 1 is gone (f)"
