"""Imports of large libraries go without Python's garbage collector, and leave it as it was."""

from __future__ import annotations

import gc

from nemo_upcycle.utils.console import collector_paused


def test_the_garbage_collector_is_on_again() -> None:
    gc.unfreeze()
    gc.enable()  # which a training of a test before may have left off
    with collector_paused():
        assert not gc.isenabled()
        made = [[number] for number in range(100_000)]
    assert gc.isenabled()
    assert gc.get_count()[0] < len(made)
    assert gc.get_freeze_count() == 0
