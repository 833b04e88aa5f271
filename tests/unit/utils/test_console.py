"""Python's garbage collector is paused while large libraries are imported, and is on again afterwards."""

from __future__ import annotations

import gc

from nemo_upcycle.utils.console import collector_paused


def test_the_garbage_collector_is_on_again() -> None:
    gc.unfreeze()
    gc.enable()  # a training of an earlier test may have left it off
    with collector_paused():
        assert not gc.isenabled()
        made = [[number] for number in range(100_000)]
    assert gc.isenabled()
    assert gc.get_count()[0] < len(made)
    assert gc.get_freeze_count() == 0
