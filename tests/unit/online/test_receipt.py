"""The receipt of all ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.online.receipt import ParameterRecord, UpcycleReceipt, read_receipt, recorded_spec
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import read_json, write_json


def _receipt(number: int) -> UpcycleReceipt:
    record = ParameterRecord(f"weight{number}", (2,), "float32", "copied", ())
    said = {"source": "dense", "source_files": {}, "spec": None, "exact": True, "inexact_because": []}
    counts = {"dense_params": 10, "total_params": 40, "active_params": 20, "bytes_read": number}
    counts |= {"bytes_needed": 10 * number, "bytes_written": 100 * number}
    return UpcycleReceipt(**said, **counts, parameters=[record], seconds=float(number), peak_rss_gib=0.5 * number)


def test_bytes_add_up_and_times_are_the_slowest_ranks() -> None:
    ranks = [_receipt(number) for number in (3, 5, 4)]
    merged = ranks[0].merge(ranks)
    assert (merged.bytes_read, merged.bytes_needed, merged.bytes_written) == (12, 120, 1200)
    assert (merged.seconds, merged.peak_rss_gib, merged.ranks) == (5.0, 2.5, 3)
    assert (merged.dense_params, merged.total_params, merged.active_params) == (10, 40, 20)
    named = [(record.name, record.rank) for record in merged.parameters]
    assert named == [("weight3", 0), ("weight5", 1), ("weight4", 2)]


def test_a_receipt_omits_defaults_of_the_spec(tmp_path: Path) -> None:
    spec = UpcycleSpec(num_experts=8, top_k=2, granularity=2)
    assert spec.to_dict() == {"num_experts": 8, "top_k": 2, "granularity": 2}
    assert recorded_spec(spec.to_dict(), tmp_path, {}) == recorded_spec(asdict(spec), tmp_path, {}) == spec


def test_a_receipt_of_a_newer_release_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    _receipt(1).write(path)
    write_json(path, read_json(path) | {"schema": 2})
    with pytest.raises(UpcycleError) as refused:
        read_receipt(path)
    assert refused.value.subject == f"schema of {path}"
