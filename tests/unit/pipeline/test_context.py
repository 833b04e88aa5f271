"""What the command lines of `nemo upcycle` say."""

from __future__ import annotations

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.context import mistake_of, refuse_bridge


def test_a_command_of_bridges_is_told_whose_it_is_and_what_to_install() -> None:
    refuse_bridge(["--factory", "llama3_8b_e8t2", "dir=recipe=1"])
    with pytest.raises(UpcycleError) as refused:
        refuse_bridge(["dense=/models/mine", "recipe=my_recipes:mine_config", "gpus=8"])
    assert refused.value.subject == "argument 'recipe=my_recipes:mine_config'"
    assert "Megatron-Bridge" in str(refused.value.got)
    assert "pip install" in refused.value.fix


def test_a_factory_of_a_module_that_python_does_not_find_is_told_so() -> None:
    mistake = mistake_of("no_such_recipes.mine(nodes=2)")
    assert mistake is not None
    assert mistake.got == "no module no_such_recipes"
    assert mistake_of("smollm2_135m_e8t2") is None
