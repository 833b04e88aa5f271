"""Megatron can be imported with a CUDA build of torch on a machine without a device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

# What torch's CUDA build does where there is no device; its CPU build raises an error that Megatron expects.
_BEFORE = """
from torch.utils import cpp_extension

def load_inline(*args, **kwargs):
    return [][-1]

cpp_extension.load_inline = load_inline
"""
_AFTER = """
from megatron.core.inference import unified_memory
print(unified_memory.has_unified_memory)
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.full  # of Megatron itself: what the next test is for
def test_megatron_alone_fails() -> None:
    done = _run(_BEFORE + _AFTER)

    assert "IndexError" in done.stderr, "Megatron has fixed it: this package's part can go"


@pytest.mark.full
def test_with_this_package_it_is_imported() -> None:
    done = _run("import nemo_upcycle" + _BEFORE + _AFTER)

    assert done.stdout.split() == ["False"], done.stderr
