"""Megatron can be imported with a CUDA build of torch on a machine without a device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

# What torch's CUDA build does where there is no device; its CPU build raises an error that Megatron expects.
_CODE = """
from torch.utils import cpp_extension
cpp_extension.load_inline = lambda *_, **__: [][-1]
from megatron.core.inference import unified_memory
print(unified_memory.has_unified_memory)
"""


@pytest.mark.full
def test_megatron_is_imported_with_this_package_and_not_without() -> None:
    alone, ours = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        for code in (_CODE, "import nemo_upcycle" + _CODE)
    )
    assert "IndexError" in alone.stderr, "Megatron has fixed it: this package's part can go"
    assert ours.stdout.split() == ["False"], ours.stderr
