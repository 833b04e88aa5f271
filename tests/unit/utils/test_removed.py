"""A teacher of an earlier release is read over where it has no weight, and else refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.utils.removed import without_teacher


@pytest.mark.parametrize("weight", [0.0, 0, None, "0.0", "0", "null"])
def test_a_teacher_without_a_weight_is_read_over(weight: Any) -> None:
    values = {"setting pretrain.data.teacher_weight": weight, "setting pretrain.data.teacher_temperature": "2.0"}
    assert without_teacher(values | {"setting pretrain.data.seed": "1"}) == {"setting pretrain.data.seed": "1"}


@pytest.mark.parametrize("weight", [1.0, 1e-9, "1.0"])
def test_a_teacher_with_a_weight_is_refused_by_name(weight: Any) -> None:
    with pytest.raises(SpecError) as refused:
        without_teacher({"setting pretrain.data.teacher_weight": weight})
    assert (refused.value.field, refused.value.got) == ("pretrain.data.teacher_weight", weight)
