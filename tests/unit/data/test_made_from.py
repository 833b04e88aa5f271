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
        (NOTED | {"chat": {"seed": 2, "files": ["a"]}}, "holds another chat (seed differ)"),
        (NOTED | {"strict": True}, "holds another chat (strict differ)"),
        (NOTED | {"files": [["/a", 4, 8]]}, "holds another chat (1 input file is changed (/a) since data was built)"),
        (NOTED | {"format": 0}, 0),
        (BLEND, "holds files that are not a chat"),
    ],
)
def test_what_differs_is_named(earlier: dict[str, Any], got: object) -> None:
    require_same(Path("data"), "chat", NOTED, NOTED)
    with pytest.raises(UpcycleError) as caught:
        require_same(Path("data"), "chat", earlier, NOTED)
    assert caught.value.got == got


def test_of_many_files_the_first_ones_are_named() -> None:
    text = changes_text({"new": list("abcde"), "gone": ["f"]}, Path("data"))
    assert text == "5 input files are new (a, b, c, and 2 more), 1 input file is gone (f) since data was built"
