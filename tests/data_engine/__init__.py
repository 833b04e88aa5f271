"""Tests of the data stage's engine. It runs in its own environment; in others, these tests are skipped."""

import pytest


pytest.importorskip("datatrove")
