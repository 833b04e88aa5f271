"""The number of the form in which runs are noted."""

from __future__ import annotations

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.schema import SCHEMA, numbered, require_known


def test_what_is_written_now_and_what_had_no_number_is_read() -> None:
    assert require_known(numbered({"stage": "import"}), "a") == SCHEMA
    assert require_known({"stage": "import"}, "a") == 0


@pytest.mark.parametrize("number", [SCHEMA + 1, -1, "1", None])
def test_another_number_is_refused_by_name(number: object) -> None:
    with pytest.raises(UpcycleError) as refused:
        require_known({"schema": number}, "runs/one/pipeline.json")
    assert (refused.value.subject, refused.value.got) == ("schema of runs/one/pipeline.json", number)
