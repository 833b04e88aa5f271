"""What the laws expected of a run stands beside what came of it, and nothing where no law was asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.planning import advice
from nemo_upcycle.planning.law import Law, OptionLaw
from nemo_upcycle.reporting.expectation import expectation_section
from nemo_upcycle.reporting.report import write_report
from nemo_upcycle.reporting.results import collect_results
from nemo_upcycle.reporting.run_folder import read_run


#: Bits per byte of MoE less baseline (tests/unit/reporting/test_report.py), and of 200 tokens in 1,000 bytes the nats.
BITS = 2 / 100 / math.log(2)
NATS = BITS * math.log(2) * 5


def _law(upcycled: float, parent_tokens: float = 1e12) -> Law:
    """Return a fitted law of the run's shape and size: the MoE differs by a constant, +-0.05."""

    def option(loss: float) -> OptionLaw:
        coefficients = {"A": 0.0, "a": 0.1, "b": 0.1, "E": loss}
        sizes = ((parent_tokens, parent_tokens), (3000, 3000), (1e8, 1e8))
        return OptionLaw("product", coefficients, *sizes, [[0.0, 0.1, 0.1, loss]] * 2, error=0.05)

    return Law("test", "a grid", {"dense": option(2.0), "upcycled_e4t2": option(2.0 + upcycled)})


def _report(run_dir: Path, monkeypatch: pytest.MonkeyPatch, law: Law | None, **plan: Any) -> tuple[str, Any]:
    """Return the section of the report, and its values."""
    monkeypatch.setattr(advice, "fitted_law", lambda: law)
    content = {"recipe": "smollm2_135m_e8t2", "dense": "/models/mine", "trained_on": "1T"} | plan
    (run_dir / "pipeline.json").write_text(json.dumps(content))
    results = collect_results(read_run(run_dir), {})
    return expectation_section(results), results["expectation"]


def _write_heldout(run_dir: Path) -> None:
    (run_dir / "data/blend").mkdir(parents=True)
    manifest = {"splits": {"heldout": {"documents": 3, "bytes": 1000, "tokens": 200}}}
    (run_dir / "data/blend/manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("expected", "outcome"),
    [(NATS, "its band holds what was measured"), (NATS - 0.06, "its band does not hold what was measured")],
)
def test_the_outcome_on_held_out_text_stands_beside_the_expectation(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, expected: float, outcome: str
) -> None:
    _write_heldout(run_dir)
    section, found = _report(run_dir, monkeypatch, _law(expected))
    measured = found["measured"]
    assert measured["difference"] == pytest.approx(NATS)
    assert measured["stderr"] == pytest.approx(NATS / 2 * 0.5 / math.sqrt(3))
    assert "| measured on held-out text | +0.100 ± 0.014 | - |" in section
    (line,) = [line for line in section.splitlines() if line.startswith("| fitted law (a grid)")]
    assert line.endswith(f"| {outcome} |")
    assert f"(90 % {expected - 0.05:+.3f} to {expected + 0.05:+.3f})" in line
    assert "Of e4t2 after 1T + 3,000 tokens." in section


def test_without_a_fitted_law_or_far_from_it_nothing_counts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, found = _report(run_dir, monkeypatch, None)
    assert "| fitted law | - | none for e4t2 |" in section
    assert found["laws"] == {}
    section, _ = _report(run_dir, monkeypatch, _law(-0.1, parent_tokens=1e11))
    assert "| too far out to count |" in section


def test_without_held_out_text_the_last_validation_counts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, found = _report(run_dir, monkeypatch, _law(-0.5))
    assert found["measured"] == {"difference": 3.25 - 3.75, "stderr": None, "of": "the last validation"}
    assert "| measured on the last validation | -0.5 | - |" in section


def test_without_a_dense_baseline_the_report_says_that_nothing_was_measured(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "dense_ct/metrics.jsonl").unlink()
    (run_dir / "evaluation/dense_ct.json").unlink()
    marker = {"stage": "dense_ct", "seconds": 0.0, "outputs": {"left_out": True}}
    (run_dir / "dense_ct/_SUCCESS.json").write_text(json.dumps(marker))
    section, found = _report(run_dir, monkeypatch, _law(-0.5))
    assert found["measured"] is None
    assert "| measured: not, for the chain trained no baseline | - | - |" in section


def test_the_section_stands_in_the_report(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, found = _report(run_dir, monkeypatch, _law(-0.5))
    assert section.startswith("## Expectation and outcome\n\n| loss of the MoE less the baseline's,")
    assert section in write_report(run_dir).read_text()
    assert json.loads((run_dir / "results.json").read_text())["expectation"] == found


def test_without_the_parents_tokens_no_law_is_asked(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _report(run_dir, monkeypatch, _law(-0.5), trained_on=None) == ("", None)
    _, found = _report(run_dir, monkeypatch, _law(-0.5), trained_on=None, dense="asset://smollm2-135m")
    assert found["parent_tokens"] == 2e12


def test_of_a_parent_with_experts_no_law_is_asked(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = json.loads((run_dir / "receipt.json").read_text())
    (run_dir / "receipt.json").write_text(json.dumps(receipt | {"parent_experts": 4}))
    assert _report(run_dir, monkeypatch, _law(-0.5)) == ("", None)
