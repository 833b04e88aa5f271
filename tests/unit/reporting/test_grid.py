"""The table of a grid, made from the files that trainings leave. Comments derive the expected numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.reporting.grid import arms_of, compare_arms
from nemo_upcycle.reporting.grid_evidence import EVIDENCE, collect_evidence, write_evidence
from nemo_upcycle.reporting.grid_table import BEGIN, END, render_table, write_grid, write_table
from nemo_upcycle.utils.files import MARKER


#: Arm -> bits per byte of its three documents after the first step, with seed 1. Each doubling of steps subtracts 0.1.
BITS = {"dense": (1.0, 1.1, 1.2), "moe": (0.9, 1.0, 1.1), "st": (0.94, 1.05, 1.16)}
STEPS = {"dense": 8, "moe": 8, "st": 4}


def described() -> dict[str, Any]:
    alike = {"tokens_per_step": 100, "schedule": "lr=1, constant", "is_rate_constant": True}
    cells = {
        f"{arm}-seed{seed}": {"arm": arm, "seed": seed, "steps": steps, **alike}
        for arm, steps in STEPS.items()
        for seed in (1, 2)
    }
    grid = {"about": "three arms", "arms": dict.fromkeys(STEPS, "what it is"), "margin": 0.002}
    return grid | {"cells": cells, "references": {"moe": "dense", "st": "moe"}}


def evaluation(bits: tuple[float, ...]) -> dict[str, Any]:
    sources = ("law/1", "law/2", "web/1")
    items = [
        {"cluster": document, "scores": {"bits_per_byte": [-100 * math.log(2) * value, 100]}}
        for document, value in zip(sources[: len(bits)], bits, strict=True)
    ]
    return {"items": {"heldout_perplexity": items}}


def seconds(arm: str, seed: int, step: int) -> float:
    """Return a step's duration in seconds: 24 (dense) or 36, plus 60 in step 1, plus a delay in every second step."""
    return (24.0 if arm == "dense" else 36.0) + (60 if step == 1 else 0) + 30 * seed * (step % 2 == seed % 2)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for cell, about in described()["cells"].items():
        folder = tmp_path / cell
        (folder / "evaluation").mkdir(parents=True)
        shift = 0.01 * (about["seed"] - 1)
        for step in (step for step in (0, 1, 2, 4, 8) if step <= about["steps"]):
            gain = 0.1 * math.log2(step) if step else -1.0
            bits = tuple(value - gain + shift for value in BITS[about["arm"]])
            (folder / f"evaluation/step={step}.json").write_text(json.dumps(evaluation(bits)))
        lines = [
            {"step": step, "loss": 1.0, "tokens": 100 * step, "seconds": seconds(about["arm"], about["seed"], step)}
            for step in range(1, about["steps"] + 1)
        ]
        if about["arm"] != "dense":
            for line in lines:
                line["router"] = {"load_cv": [0.1 * line["step"], 0.3 * line["step"]], "dropped": [0.0, None]}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {"flops_per_token": {"full": 1e6 * (1 if about["arm"] == "dense" else 2)}, "ranks": 2}
        (folder / "training.json").write_text(json.dumps(settings))
        (folder / MARKER).write_text(json.dumps({"stage": cell, "inputs": {}, "outputs": {}}))
    return tmp_path


def compared(run_dir: Path, described: dict[str, Any]) -> dict[str, Any]:
    evidence = collect_evidence(run_dir, "mine", described)
    return compare_arms(arms_of(evidence), described)


def rendered(run_dir: Path) -> str:
    return render_table({"grid": "mine", "about": "three arms", **compared(run_dir, described())})


def test_an_arm_has_its_tokens_flops_and_hours(run_dir: Path) -> None:
    values = compared(run_dir, described())
    moe = values["arms"]["moe"]
    assert (moe["tokens"], moe["flops"]) == (800, 16e8)
    # For each step, the time of the faster seed counts, without the extra minute of the first step.
    assert moe["rank_hours"] == pytest.approx(8 * 36 * 2 / 3600)
    assert moe["bits_per_byte"]["value"] == pytest.approx(0.705)  # 1.0 - 0.3; seed 2 is 0.01 higher
    assert moe["bits_per_byte"]["high"] == pytest.approx(0.705 + 12.706 * 0.005, rel=1e-3)
    assert moe["sources"]["law"]["value"] == pytest.approx(0.655)
    assert moe["routers"]["load_cv"][1] == [200, pytest.approx(0.4)]
    assert values["arms"]["dense"]["routers"] == {}


def tokens_of(points: list[dict[str, Any]]) -> list[int]:
    return [point["tokens"] for point in points]


def test_arms_are_compared_after_equal_tokens_and_with_equal_flops(run_dir: Path) -> None:
    values = compared(run_dir, described())
    moe, st = values["differences"]["moe"], values["differences"]["st"]
    assert tokens_of(moe["along"]) == [0, 100, 200, 400, 800]
    assert moe["end"]["difference"] == pytest.approx(-0.1)
    assert moe["better_from"] == 0
    # The MoE after 400 tokens has the FLOPs of the parent after 800 tokens. At equal tokens, the MoE is 0.1 better.
    # At equal FLOPs, the MoE has trained on half as many tokens.
    assert (moe["equal_flops"]["tokens"], moe["equal_flops"]["reference_tokens"]) == (400, 800)
    assert moe["equal_flops"]["flops_ratio"] == pytest.approx(1.0)
    assert moe["equal_flops"]["difference"] == pytest.approx(0.0, abs=1e-9)
    assert moe["equal_flops"]["verdict"] == "tie"
    assert st["end"]["difference"] == pytest.approx(0.05)  # at 400 tokens, the end of the shorter arm
    assert st["equal_flops"] is None
    assert values["tests"] == {"start": 2, "end": 2, "equal_flops": 1}
    # Seeds do not differ. Documents spread by 0.01 with two degrees of freedom. For two tests, t(0.9875, 2) = 6.205.
    assert st["end"]["stderr_documents"] == pytest.approx(0.01 / math.sqrt(3))
    assert st["end"]["high"] - st["end"]["difference"] == pytest.approx(6.205 * 0.01 / math.sqrt(3), rel=1e-3)


def falling_grid(steps: dict[str, int], **schedules: str) -> dict[str, Any]:
    """Return the grid with a falling learning rate and other lengths."""
    found = described() | {"references": {"moe": "dense"}}
    for about in found["cells"].values():
        about |= {"is_rate_constant": False, "steps": steps.get(about["arm"], about["steps"])}
        about["schedule"] = schedules.get(about["arm"], "lr=1, cosine")
    return found


def test_arms_of_other_lengths_are_compared_at_their_ends(run_dir: Path) -> None:
    """The MoE trains half the steps at twice the FLOPs. The MoE's end is not compared with the parent's middle."""
    values = compared(run_dir, falling_grid({"moe": 4}))
    found = values["differences"]["moe"]
    assert found["start"]["difference"] == pytest.approx(-0.1)
    assert tokens_of(found["along"]) == [0]
    assert (found["end"], found["better_from"]) == (None, None)
    assert (found["equal_flops"]["tokens"], found["equal_flops"]["reference_tokens"]) == (400, 800)
    assert found["equal_flops"]["difference"] == pytest.approx(0.0, abs=1e-9)
    text = render_table({"grid": "mine", "about": "", **values})
    row = next(line for line in text.splitlines() if line.startswith("| moe minus dense |"))
    assert row.split(" | ")[2:4] == ["400", "800"]


def test_arms_of_one_schedule_are_compared_on_their_way(run_dir: Path) -> None:
    for schedule, points in (("lr=1, cosine", [0, 100, 200, 400, 800]), ("lr=2, cosine", [0, 800])):
        found = compared(run_dir, falling_grid({}, moe=schedule))["differences"]["moe"]
        assert tokens_of(found["along"]) == points
        assert found["end"]["difference"] == pytest.approx(-0.1)
        assert found["equal_flops"] is None  # 400 tokens are in the middle of one run, 800 at the end of the other


def test_a_training_within_two_percent_costs_the_same(run_dir: Path) -> None:
    for seed in (1, 2):
        path = run_dir / f"moe-seed{seed}/training.json"
        path.write_text(json.dumps({"flops_per_token": {"full": 1.015e6}, "ranks": 2}))
    found = compared(run_dir, falling_grid({}))["differences"]["moe"]["equal_flops"]
    assert (found["tokens"], found["reference_tokens"], found["flops_ratio"]) == (800, 800, pytest.approx(1.015))


def test_arms_of_other_batches_are_compared_after_equal_tokens(run_dir: Path) -> None:
    """With 200 tokens per step, the MoE's points after 1, 2 and 4 steps match the parent's after 2, 4 and 8 steps."""
    other = described()
    for about in other["cells"].values():
        if about["arm"] == "moe":
            about["tokens_per_step"] = 200
    other |= {"references": {"moe": "dense"}}
    values = compared(run_dir, other)
    found = values["differences"]["moe"]
    assert tokens_of(found["along"]) == [0, 200, 400, 800]
    assert found["end"]["difference"] == pytest.approx(0.0, abs=1e-9)  # the MoE is 0.1 better, but one doubling behind


def test_omits_steps_that_arms_scored_with_other_seeds(run_dir: Path) -> None:
    (run_dir / "moe-seed1/evaluation/step=2.json").unlink()
    (run_dir / "dense-seed2/evaluation/step=2.json").unlink()
    values = compared(run_dir, described())
    assert tokens_of(values["differences"]["moe"]["along"]) == [0, 100, 400, 800]


def test_the_table_has_a_row_for_each_arm(run_dir: Path) -> None:
    # Half of the interval is t(0.975, 1) = 12.706 times 0.005. The MoE's 800 tokens take 9.6 rank minutes.
    assert "| moe | 800 | 1.6e+09 | 2.005 ± 0.064 | 0.705 ± 0.064 | 9.6 |" in rendered(run_dir)


def test_an_arm_without_a_score_at_its_end_is_named(run_dir: Path) -> None:
    (run_dir / "moe-seed1/evaluation/step=8.json").unlink()
    assert "Omitted because they were not scored at the end: moe of seed 1." in rendered(run_dir)
    (run_dir / "moe-seed2/evaluation/step=8.json").unlink()
    with pytest.raises(UpcycleError, match="Arm moe has no score at its last step"):
        rendered(run_dir)
    for seed in (1, 2):
        (run_dir / f"dense-seed{seed}/evaluation/step=0.json").unlink()
    with pytest.raises(UpcycleError, match="Arm dense has no score at its first step"):
        rendered(run_dir)


@pytest.mark.slow
def test_evidence_alone_gives_the_same_table_and_page(run_dir: Path, tmp_path: Path) -> None:
    table = write_table(run_dir, "mine", described())
    page, folder = tmp_path / "docs/mine.md", tmp_path / "docs/mine"
    folder.mkdir(parents=True)
    (folder / EVIDENCE).write_bytes((run_dir / "table" / EVIDENCE).read_bytes())
    page.write_text(f"# Mine\n\nAn answer.\n\n{BEGIN}\nold\n{END}\nThe end.\n")
    assert write_grid(folder) == page
    text = page.read_text()
    assert not (folder / "table.md").exists()
    assert (folder / "table.json").read_bytes() == (run_dir / "table/table.json").read_bytes()
    assert text.startswith("# Mine\n\nAn answer.\n")
    assert text.endswith("\nThe end.\n")
    assert "\nold\n" not in text
    assert "![curves](mine/curves.png)" in text
    assert (folder / "curves.png").stat().st_size > 10_000
    assert table.read_text().partition("\n\n")[2].replace("](", "](mine/") in text
    assert write_grid(folder).read_text() == text


def test_the_table_shows_contaminated_held_out_text(run_dir: Path) -> None:
    assert "Held-out text" not in write_table(run_dir, "mine", described()).read_text()
    counts = {"documents": 14, "above": 2, "removed": 1, "ngrams": 1000, "shared": 123}
    row = {"source": "law", "split": "heldout", **counts, "ngrams_after": 900, "shared_after": 9}
    own = run_dir / "own"
    own.mkdir()
    overlap = {"most": 0.5, "words": 13, "every": 1, "rows": [row]}
    (own / "manifest.json").write_text(json.dumps({"heldout_overlap": overlap}))
    (run_dir / "data").mkdir()
    marker = {"stage": "data", "outputs": {"folder": str(own)}}
    (run_dir / "data/_SUCCESS.json").write_text(json.dumps(marker))
    text = write_table(run_dir, "mine", described()).read_text()
    assert "| law, heldout | 14 | 2 | 1 | 12.3 % | 1.0 % |" in text
    assert json.loads((run_dir / "table/table.json").read_text())["heldout_overlap"] == overlap


def test_a_stopped_grid_gets_a_table_of_finished_trainings(run_dir: Path) -> None:
    (run_dir / "grid.json").write_text(json.dumps({"name": "mine", "described": described()}))
    for cell in ("st-seed1", "st-seed2", "moe-seed2"):
        (run_dir / cell / MARKER).unlink()
    text = write_grid(run_dir).read_text()
    assert "Omitted because they did not finish: `moe-seed2`, `st-seed1`, `st-seed2`." in text
    assert "| moe minus dense |" in text
    assert "st minus moe" not in text
    for marker in run_dir.glob(f"*/{MARKER}"):
        marker.unlink()
    with pytest.raises(UpcycleError, match="has no finished training"):
        write_grid(run_dir)


def test_a_page_without_a_place_for_the_table_is_refused(run_dir: Path) -> None:
    folder, page = run_dir / "mine", run_dir / "mine.md"
    write_evidence(folder / EVIDENCE, collect_evidence(run_dir, "mine", described()))
    page.write_text("my own words\n")
    with pytest.raises(UpcycleError, match=r"mine\.md has no lines"):
        write_grid(folder)
    assert page.read_text() == "my own words\n"
    assert not (folder / "table.md").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x1f\x8b\x08\x00"])
def test_damaged_evidence_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / EVIDENCE).write_bytes(content)
    with pytest.raises(UpcycleError, match=EVIDENCE):
        write_grid(tmp_path)


def test_evaluations_of_other_documents_are_named(run_dir: Path) -> None:
    (run_dir / "st-seed2/evaluation/step=1.json").write_text(json.dumps(evaluation((1.0, 1.0))))
    with pytest.raises(UpcycleError, match=r"st-seed2/evaluation/step=1\.json does not score the same documents"):
        write_table(run_dir, "mine", described())


def test_what_is_of_one_seed_gets_no_verdict(run_dir: Path) -> None:
    (run_dir / "st-seed2/evaluation/step=4.json").unlink()
    values = compared(run_dir, described())
    assert values["differences"]["st"]["end"]["verdict"] == "one seed"
    assert values["tests"]["end"] == 1
    text = render_table({"grid": "mine", "about": "", **values})
    assert "(one seed)" in next(line for line in text.splitlines() if line.startswith("| st minus moe |"))
