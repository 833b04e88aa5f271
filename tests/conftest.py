"""Gives every test the same environment, before torch or a hub library is imported."""

from __future__ import annotations

import os
import signal

import pytest

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import
from tests.durations import longest_first
from tests.environment import clean
from tests.without_nemo import WithoutNeMo, hide_nemo


need_no_cuda_to_import()  # because some tests import Megatron before the package
clean(os.environ)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs (`&`) ignore Ctrl-C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-nemo", action="store_true", help="only tests that import no NeMo")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("without_nemo"):
        hide_nemo()
        config.pluginmanager.register(WithoutNeMo())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # only in a worker of xdist
        longest_first(items)
