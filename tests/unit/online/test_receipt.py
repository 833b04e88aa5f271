"""The receipt of all ranks."""

from __future__ import annotations

from nemo_upcycle.online.receipt import ParameterRecord, UpcycleReceipt


def _receipt(number: int) -> UpcycleReceipt:
    record = ParameterRecord(f"weight{number}", (2,), "float32", "copied", ())
    return UpcycleReceipt(
        source="dense",
        source_files={},
        spec=None,
        exact=True,
        inexact_because=[],
        dense_params=10,
        total_params=40,
        active_params=20,
        parameters=[record],
        bytes_read=number,
        bytes_needed=10 * number,
        bytes_written=100 * number,
        seconds=float(number),
        peak_rss_gib=0.5 * number,
    )


def test_bytes_add_up_and_times_are_the_slowest_ranks() -> None:
    ranks = [_receipt(number) for number in (3, 5, 4)]
    merged = ranks[0].merge(ranks)
    assert (merged.bytes_read, merged.bytes_needed, merged.bytes_written) == (12, 120, 1200)
    assert (merged.seconds, merged.peak_rss_gib, merged.ranks) == (5.0, 2.5, 3)
    assert (merged.dense_params, merged.total_params, merged.active_params) == (10, 40, 20)
    named = [(record.name, record.rank) for record in merged.parameters]
    assert named == [("weight3", 0), ("weight5", 1), ("weight4", 2)]
