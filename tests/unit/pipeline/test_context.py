"""What the command lines of `nemo upcycle` say."""

from __future__ import annotations

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.context import refuse_bridge


def test_a_command_of_bridges_is_told_whose_it_is_and_what_to_install() -> None:
    refuse_bridge(["--factory", "llama3_8b_e8t2", "dir=recipe=1"])
    with pytest.raises(UpcycleError) as refused:
        refuse_bridge(["dense=/models/mine", "recipe=my_recipes:mine_config", "gpus=8"])
    assert refused.value.subject == "argument 'recipe=my_recipes:mine_config'"
    assert "Megatron-Bridge" in str(refused.value.got)
    assert "pip install" in refused.value.fix
