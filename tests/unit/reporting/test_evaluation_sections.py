"""Report sections beside the scores: sources of held-out text, contamination, and a published table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_upcycle.data.losses import lost_text
from nemo_upcycle.reporting.report import write_report
from tests.unit.reporting.conftest import EVALUATIONS
from tests.unit.reporting.test_report import rows


def change(run_dir: Path, edit: Any) -> None:
    """Edit every evaluation of a run."""
    for name in EVALUATIONS:
        path = run_dir / "evaluation" / f"{name}.json"
        evaluation = json.loads(path.read_text())
        edit(evaluation)
        path.write_text(json.dumps(evaluation))


#: A source of a manifest; its Parquet file has the text in another column.
LAW = {
    "text_key": "body",
    "steps": {"read": {"in": 41, "kept": 40, "removed": {}}},
    "splits": {"train": {"documents": 40, "tokens": 9, "bytes": 10**7}},
    "lost": {"reasons": {"no field body": {"documents": 1, "bytes": 5343, "whole": 1, "first": "a.parquet:0"}}},
}


def test_shows_sources_and_contamination(run_dir: Path) -> None:
    def name_documents(evaluation: dict[str, Any]) -> None:
        for item, document in zip(evaluation["items"]["heldout_perplexity"], ("law/a", "web/a", "law/b"), strict=True):
            item["cluster"] = document

    change(run_dir, name_documents)
    sets = {"lm-eval/quiz": {"items": 1000, "items_hit": 12}}
    left = {"words": 8, "sets": {"lm-eval/quiz": {"items": 1000, "items_hit": 3}}}
    (run_dir / "data/blend").mkdir(parents=True)
    (run_dir / "data/blend/contamination.json").write_text(json.dumps({"sets": sets, "report": left}))
    counts = {"documents": 14, "above": 2, "removed": 1, "ngrams": 1000, "shared": 123}
    row = {"source": "law", "split": "heldout", **counts, "ngrams_after": 900, "shared_after": 9}
    overlap = {"most": 0.5, "words": 13, "every": 1, "rows": [row]}
    (run_dir / "data/blend/manifest.json").write_text(
        json.dumps({"heldout_overlap": overlap, "sources": {"law": LAW}})
    )
    found = rows(write_report(run_dir))
    # 110 and 130 nats over 200 bytes give 240 / 200 / ln 2 = 1.7312. Without one document, the value is 1.8755, and
    # without the other it is 1.5869, so the jackknife error is 0.1443. With one degree of freedom, t is 12.71.
    assert found["law (2 documents)"][0] == "1.7 ± 1.8"
    assert found["web (1 documents)"] == ["1.731", "1.731", "1.601", "1.574"]
    assert found["quiz"] == ["1,000", "12", "3"]
    assert found["law, heldout"] == ["14", "2", "1", "12.3 %", "1.0 %"]
    assert found["law"] == ["41", "40", "9.5 MiB", "5343 bytes", "body", lost_text(LAW["lost"])[0].replace("_", r"\_")]
    assert json.loads((run_dir / "results.json").read_text())["heldout_overlap"] == overlap


def test_a_task_with_examples_is_that_without(run_dir: Path) -> None:
    def rename(evaluation: dict[str, Any]) -> None:
        for part in ("metrics", "items"):
            evaluation[part] = json.loads(json.dumps(evaluation[part]).replace("quiz", "mmlu_letter_5shot"))

    change(run_dir, rename)
    (run_dir / "data/blend").mkdir(parents=True)
    content = {"sets": {"mmlu": {"items": 14042, "items_hit": 0}}, "report": {"words": 8, "sets": {}}}
    (run_dir / "data/blend/contamination.json").write_text(json.dumps(content))
    report = write_report(run_dir)
    assert rows(report)["mmlu_letter_5shot"] == ["14,042", "0", "0"]
    assert "\n| heldout_perplexity |" not in report.read_text()  # documents of held-out text are not items


def test_tasks_without_data_and_published_values_stand_beside_ours(run_dir: Path) -> None:
    columns = {"quiz/acc": [65.2, 64.0], "other/acc": [1.0, 2.0]}
    published = {"source": "a table", "models": ["Parent", "MoE"], "columns": columns}

    def edit(evaluation: dict[str, Any]) -> None:
        evaluation["missing"] = {"piqa": "ConnectionError: no <b>hub</b>"}
        evaluation["suite"]["config"]["published"] = published

    change(run_dir, edit)
    (run_dir / "data/blend").mkdir(parents=True)
    content = {"sets": {}, "without": ["lm-eval/quiz"], "report": {"words": 8, "sets": {}}}
    (run_dir / "data/blend/contamination.json").write_text(json.dumps(content))
    report = write_report(run_dir)
    text = report.read_text()
    assert "Not scored: piqa. Its data are not available: ConnectionError: no \\<b\\>hub\\</b\\>." in text
    assert rows(report)["quiz"] == ["not searched for", "-", "-"]
    assert "| % | published: Parent | published: MoE | parent | MoE at step 0 | trained MoE | trained" in text
    assert (
        "| acc (quiz) | 65.20 | 64.00 | 25 ± 80 | 50 ± 80 | 50 ± 80 | 25 ± 80 |\n| mean of the rows | 65.20 |" in text
    )
