"""An init method is refused if its result overflows or its name is taken. `docs/add_init_method.md` adds a method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.init.experts import ExpertMatrix
from nemo_upcycle.init.methods import METHODS, init_method
from tests.models import build_chunks, moe_settings


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("looks_first", [True, False])
def test_a_method_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch, dense: Path, looks_first: bool) -> None:
    def blow_up(matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
        if looks_first:
            matrix.whole_FD()
        matrix.local_FD.mul_(1e6)

    monkeypatch.setitem(METHODS, "noise", replace(METHODS["noise"], change=blow_up))
    spec = UpcycleSpec(num_experts=4, top_k=2, method="noise")
    with open_dense(dense) as source:
        (model,) = build_chunks(dense, params_dtype=torch.float16, **moe_settings(source.architecture, spec))
        words = r"gate_proj\.weight has numbers too large for float16"
        with pytest.raises(CheckpointError, match=words):
            upcycle_into([model], source, spec)


def test_a_name_that_is_taken_is_refused() -> None:
    def copy(matrix: ExpertMatrix, spec: UpcycleSpec) -> None:
        raise AssertionError

    with pytest.raises(SpecError, match="Init method 'copy' exists already"):
        init_method("other copies")(copy)
    assert METHODS["copy"].change is not copy
