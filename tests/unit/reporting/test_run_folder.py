"""What a run's folder says of its stages."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_upcycle.reporting.report import write_report


def test_stages_stand_in_the_order_in_which_they_need_each_other(run_dir: Path) -> None:
    needs = {"pretrain": ["upcycle"], "dense_ct": ["import"], "upcycle": ["import"], "import": []}
    needs |= {"evaluate": ["import", "pretrain", "dense_ct"], "suite": ["evaluate"]}
    for stage, names in needs.items():
        (run_dir / stage).mkdir(exist_ok=True)
        marker = {"stage": stage, "seconds": 1.0, "inputs": dict.fromkeys((f"stage {name}" for name in names), "")}
        content = {"tasks": {}} if stage == "suite" else marker
        (run_dir / stage / "_SUCCESS.json").write_text(json.dumps(content))
    write_report(run_dir)
    results = json.loads((run_dir / "results.json").read_text())
    assert list(results["stage_seconds"]) == ["import", "upcycle", "pretrain", "dense_ct", "evaluate"]
