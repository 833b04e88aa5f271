"""What the command lines of `nemo upcycle` say."""

from __future__ import annotations

from nemo_upcycle.pipeline.context import mistake_of


def test_a_factory_of_an_unknown_module_is_refused() -> None:
    mistake = mistake_of("no_such_recipes.mine(nodes=2)")
    assert mistake is not None
    assert mistake.got == "no module no_such_recipes"
    assert mistake_of("smollm2_135m_e8t2") is None
