"""Tests of the data stage's engine, which runs in an environment of its own: elsewhere they are skipped."""

import pytest


pytest.importorskip("datatrove")
