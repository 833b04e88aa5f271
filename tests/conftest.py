"""Gives every test, whichever are asked for, the same environment; before torch or a library of a hub is imported."""

from __future__ import annotations

import os
import signal

import nemo_upcycle  # noqa: F401 - before Megatron, which alone cannot be imported where there is nvcc and no card
from tests.environment import clean


clean(os.environ)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind `&` ignore Ctrl-C
