"""Gives every test, whichever are asked for, the same environment; before torch or a library of a hub is imported."""

from __future__ import annotations

import os

from tests.environment import clean


clean(os.environ)
