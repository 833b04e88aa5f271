"""Tests of the data stage's engine. The engine has its own environment; elsewhere, these tests are skipped."""

import pytest


pytest.importorskip("datatrove")
