from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.heldout import BITS
from nemo_upcycle.evaluation.paired import paired_difference
from nemo_upcycle.evaluation.statistics import t_quantile
from nemo_upcycle.pipeline.markers import StageFolder, setting_texts
from nemo_upcycle.reporting.figures import loss_figure
from nemo_upcycle.reporting.report import write_report
from nemo_upcycle.reporting.run_folder import read_run
from nemo_upcycle.trainers.lineage import Branch, begin_branch, end_move
from tests.unit.reporting.conftest import EVALUATIONS, RECEIPT, SETTINGS, lengthen


def rows(report: Path) -> dict[str, list[str]]:
    """Return the cells of each table row, by its first cell."""
    cells = [line.strip("| ").split(" | ") for line in report.read_text().splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def add_to_steps(run_dir: Path, *added: dict[str, Any]) -> None:
    """Add values to the lines of the MoE's first steps."""
    path = run_dir / "pretrain/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, more in zip([line for line in lines if "loss" in line], added, strict=False):
        line |= more
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def results(reported: Path) -> dict[str, Any]:
    return json.loads((reported / "results.json").read_text())


def test_the_results_hold_the_inputs(results: dict[str, Any]) -> None:
    for name, evaluation in EVALUATIONS.items():
        for metric, entry in evaluation["metrics"].items():
            observations = 3 if metric == BITS else 4
            half = t_quantile(0.975, observations - 1) * entry["stderr"]
            ends = {"low": pytest.approx(entry["value"] - half), "high": pytest.approx(entry["value"] + half)}
            found = results["evaluation"][name][metric]
            assert found == {"value": entry["value"], "stderr": entry["stderr"], **ends}
    assert results["step0"]["max_relative_loglikelihood_difference"] == pytest.approx(0.001)  # -130 to -130.13
    expected = paired_difference(EVALUATIONS["dense_ct"], EVALUATIONS["trained"], BITS, tests=6)
    assert results["paired"]["trained_minus_dense_ct"][BITS] == expected | {"is_trial": True}
    assert set(results["paired"]) == {"trained_minus_dense_ct", "trained_minus_dense", "dense_ct_minus_dense"}
    assert results["receipt"]["parameters_made_by"] == {"copied": 1, "copied into 4 experts": 1}


def test_the_training_summary(results: dict[str, Any]) -> None:
    done = results["training"]["pretrain"]
    load = done.pop("expert_load")
    expected = {"steps": 3, "tokens": 3000, "seconds": 6.0, "tokens_per_s": 500.0, "memory_gib": 2.5}
    expected |= {"first_loss": 3.25, "last_loss": 2.75, "first_validation_loss": 3.5, "last_validation_loss": 3.25}
    assert done == expected | {"highest_lr": 1e-4, "last_lr": 1e-4, "settings": SETTINGS}
    assert load["last"] == pytest.approx({"balanced": 0.25, "min": 0.2, "max": 0.3, "cv": 0.2})  # 0.05 / 0.25
    assert load["first"]["cv"] == pytest.approx((3 * 0.15**2 + 0.45**2) ** 0.5 / 2 / 0.25)
    assert "expert_load" not in results["training"]["dense_ct"]


def test_the_report_prints_these_numbers(reported: Path) -> None:
    found = rows(reported / "report.md")
    # Differences of 2, 1.9 and 2.1 nats in windows of 100 bytes: mean 2, standard error 0.1 / sqrt(3), shown in bits
    # per byte. Two metrics of three pairs are six tests, so t(1 - 0.025 / 6, 2) = 10.89.
    against_baseline, _, _ = found["bits per byte (heldout_perplexity)"]  # in the second table
    assert against_baseline == "+0.0289 ± 0.0091"
    assert found["training loss, last step"] == ["2.75", "3.25"]
    assert found["most used expert in any layer"] == ["70.00 %", "30.00 %"]
    assert found["changed answers"] == ["1 of 4"]
    assert found["parent in Megatron"] == ["7.5e-06", "2e-05"]
    assert found["bytes written"] == ["1.50 GiB"]
    assert found["pretrain"] == ["1:01", "`pretrain/_SUCCESS.json`"]
    text = (reported / "report.md").read_text()
    # 0.0321 over three documents: t is 4.303
    assert "| bits per byte (heldout_perplexity) | 1.73 ± 0.14 | 1.73 ± 0.14 | 1.60 ± 0.14 |" in text
    assert "saw the same number of tokens. The MoE uses 1.50 times as many parameters per token." in text
    assert "`seed=4321`" in text
    trained, verdict = text.split("\n\n")[1:3]
    assert trained.endswith("Trained by Megatron-Bridge for 3 steps on 3,000 tokens, in 0:06 on 2 ranks (CPU).")
    assert verdict.endswith("the MoE equals its parent at step 0. 3 steps are too few to measure a benefit.")


def test_a_trial_has_no_verdict_no_bold_and_no_alarm(reported: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (reported / name).read_text().replace("lower is better", "").replace("higher is better", "")
        for word in ("is better", "no significant difference", "balanced; at most", "imbalanced", "**", "<strong>"):
            assert word not in text, name
    text = (reported / "report.md").read_text()
    assert "Below 100 steps there is no verdict: trained MoE 3, trained baseline 3." in text


def test_enough_steps_bring_verdicts_and_an_alarm(judged: Path) -> None:
    text = (judged / "report.md").read_text()
    uneven = "The busiest expert had 2.8 times a balanced load (layer 0, step 100), and 1.2 times at the last step."
    assert f"**Expert load was at times imbalanced.** {uneven}" in text.split("\n\n")[4]
    assert "Below 100 steps" not in text


def test_a_baseline_of_few_steps_alone_is_not_judged(run_dir: Path) -> None:
    short = (run_dir / "dense_ct/metrics.jsonl").read_text()
    lengthen(run_dir)
    (run_dir / "dense_ct/metrics.jsonl").write_text(short)
    text = write_report(run_dir).read_text()
    verdict = "better than its parent (-0.135 ± 0.052) and not judged against the dense baseline (+0.0289 ± 0.0091)"
    assert verdict in text.split("\n\n")[2]
    assert "Below 100 steps there is no verdict: trained baseline 3." in text


def test_the_command_and_the_resolved_recipes_are_named(run_dir: Path) -> None:
    assert "## Command" not in write_report(run_dir).read_text()  # older runs have no command.txt
    (run_dir / "command.txt").write_text("nemo upcycle pipeline --factory smollm2_135m_e8t2 dir=demo --yes\n")
    (run_dir / "recipes").mkdir()
    for stage in ("pretrain", "dense_ct"):
        (run_dir / f"recipes/{stage}.yaml").write_text("_target_: nemo.collections.llm.api.pretrain\n")
    text = write_report(run_dir).read_text()
    assert "```bash\nnemo upcycle pipeline --factory smollm2_135m_e8t2 dir=demo --yes\n```" in text
    assert "[`recipes/pretrain.yaml`](recipes/pretrain.yaml), [`recipes/dense_ct.yaml`](recipes/dense_ct.yaml)" in text


def test_the_report_says_how_and_how_fast_it_was_trained(run_dir: Path) -> None:
    other = SETTINGS | {"data": "blend tiny (blend)", "ranks": 1}
    del other["balancing"]
    (run_dir / "dense_ct/training.json").write_text(json.dumps(other))
    # The last step has half the rate of the mean over all steps.
    rates = {"tokens_per_s": 250.0, "tflops_per_gpu": {"full": 100.0, "causal": 90.0}}
    rates |= {"mfu": {"bf16": {"full": 0.1, "causal": 0.09}}, "memory_gib": 68.5}
    add_to_steps(run_dir, rates | {"memory_gib": 69.5, "memory_share": 0.875}, rates, rates)
    found = rows(write_report(run_dir, {"pretrain": {"memory_gib": 66.25, "tokens_per_s": 480.0}}))
    assert found["planned memory of the fullest rank"] == ["66.25 GiB", "-"]
    assert found["planned tokens per second"] == ["480", "-"]
    assert rows(write_report(run_dir)) == found  # another report keeps the planned numbers
    assert found["rank-hours spent in steps"] == ["0.00333", "0.00167"]  # 6 s on two ranks, and on one rank
    rate = "3e-05, CosineAnnealing to 3e-07 over 3 steps, 1 of them warm-up"
    assert found["peak learning rate"] == [rate, rate]
    assert found["load balancing of the experts"] == ["aux_loss 0.01, z_loss 0.001", "-"]
    text = (run_dir / "report.md").read_text()
    assert "Data of the trained MoE: NeMo's mock data (random tokens)." in text
    assert "Data of the trained baseline: blend tiny (blend)." in text
    assert found["TFLOP/s per rank (full attention / causal half)"] == ["200 / 180", "-"]
    assert found["MFU, BF16 peak (full attention / causal half)"] == ["20.0 % / 18.0 %", "-"]
    assert found["peak memory per rank"] == ["69.50 GiB (88 % of its GPU)", "2.50 GiB"]


def test_samples_stand_beside_each_other(run_dir: Path) -> None:
    assert "## Samples" not in write_report(run_dir).read_text()  # older evaluations have no samples
    for name, value in EVALUATIONS.items():
        texts = ("1990", "The state", "of the union", f"a|b\n*{name}*")
        sample = dict(zip(("document", "prompt", "goes_on", "continuation"), texts, strict=True))
        (run_dir / "evaluation" / f"{name}.json").write_text(json.dumps({**value, "samples": [sample]}))
    text = write_report(run_dir).read_text()
    table = text.split("## Samples")[1].split("## ")[0]
    assert "|  | 1990 |\n|---|---|\n| prompt | The state |\n| the original text | of the union |" in table
    assert "| trained MoE | a\\|b \\*trained\\* |" in table


def test_the_report_says_so_when_the_dense_baseline_wins(judged: Path) -> None:
    text = (judged / "report.md").read_text()
    assert "+0.0289 ± 0.0091 | the baseline is better |" in text.split("\n\n")[3]
    verdict = "better than its parent (-0.135 ± 0.052) and worse than the dense baseline (+0.0289 ± 0.0091)"
    assert verdict in text.split("\n\n")[2]
    found = rows(judged / "report.md")
    assert found["bits per byte (heldout_perplexity)"][0] == "+0.0289 ± 0.0091 (trained baseline is better)"
    assert found["acc (quiz)"][0].endswith("(no significant difference)")


def test_the_cards_of_the_exported_models_get_the_scores(run_dir: Path) -> None:
    for name in ("hf", "dense_ct/hf"):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "nemo_upcycle.json").write_text('{"made_by": "nemo-upcycle export"}')
        (run_dir / name / "README.md").write_text("# mine\n\n## Licence\n\nmit\n")
    write_report(run_dir)
    for name in ("hf", "dense_ct/hf"):
        card = (run_dir / name / "README.md").read_text()
        assert "| acc (quiz) | 0.25 ± 0.80 | 0.50 ± 0.80 | 0.50 ± 0.80 | 0.25 ± 0.80 |" in card
        assert "lm-eval 0.4.13 in float32. " in card


_WITHOUT = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "megatron", "nemo", "lightning"))  # not to be imported
from nemo_upcycle.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_needs_no_torch(run_dir: Path) -> None:
    """A finished run with its data is often viewed on a laptop."""
    (run_dir / "data/blend").mkdir(parents=True)
    (run_dir / "data/blend/contamination.json").write_text('{"sets": {}, "report": {"words": 8, "sets": {}}}')
    command = [sys.executable, "-c", _WITHOUT, "report", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{run_dir / 'report.md'}\n"), done.stderr
    assert "+0.0289 ± 0.0091" in (run_dir / "report.md").read_text()


_LINES = "pretrain/metrics.jsonl"
_LACKING = ('{"loss": 1.0}', '{"step": 4, "loss": 1.0, "tokens": 4000}', "[1]")
_LACKING += ('{"step": 4, "loss": "none", "tokens": 4000, "seconds": 1}',)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("receipt.json", None, "does not exist, and stage 'upcycle' writes it"),
        (_LINES, None, "does not exist, and stage 'pretrain' writes it"),
        ("evaluation/dense_ct.json", None, "does not exist, and stage 'evaluate' writes it"),
        (_LINES, '+{"step": 4, "lo', r"metrics\.jsonl:7"),
        *((_LINES, f"+{line}\n", r"metrics\.jsonl:7 is not a JSON object") for line in _LACKING),
        ("receipt.json", "{}", "has no spec. Run stage 'upcycle' again"),
        ("receipt.json", json.dumps(RECEIPT | {"ranks": "<b>"}), "has an invalid value of ranks: '<b>'"),
        ("pretrain/_SUCCESS.json", "[]", "has no JSON object"),
        ("dense_ct/metrics.jsonl", '{"step": 0, "validation_loss": 3.0}\n', "no step with a loss"),
    ],
)
def test_a_file_that_lacks_something_is_named(run_dir: Path, file: str, content: str | None, words: str) -> None:
    path = run_dir / file
    before = path.read_text()
    path.unlink()
    if content is not None:
        path.write_text(before + content[1:] if content.startswith("+") else content)
    with pytest.raises(UpcycleError, match=words) as caught:
        write_report(run_dir)
    assert str(path) in str(caught.value)
    assert not (run_dir / "report.md").exists()


def test_a_run_without_the_dense_baseline(run_dir: Path) -> None:
    (run_dir / "dense_ct" / "metrics.jsonl").unlink()
    (run_dir / "evaluation" / "dense_ct.json").unlink()
    marker = {"stage": "dense_ct", "seconds": 0.0, "outputs": {"left_out": True}}
    (run_dir / "dense_ct" / "_SUCCESS.json").write_text(json.dumps(marker))
    text = write_report(run_dir).read_text()
    assert "baseline" not in text.split("## Training")[0]
    assert list(json.loads((run_dir / "results.json").read_text())["paired"]) == ["trained_minus_dense"]


def test_a_group_stands_for_its_tasks(run_dir: Path) -> None:
    online = {**RECEIPT, "ranks": 2, "layout": {"tensor": 1, "expert": 2}, "bytes_read": 2**27}
    (run_dir / "pretrain" / "receipt.json").write_text(json.dumps(online))
    for name, value in EVALUATIONS.items():
        metrics = {**value["metrics"], "all/acc": value["metrics"]["quiz/acc"]}
        grouped = {**value, "metrics": metrics, "groups": {"all": ["quiz"]}}
        (run_dir / "evaluation" / f"{name}.json").write_text(json.dumps(grouped))
    found = rows(write_report(run_dir))
    assert "acc (all)" in found
    assert "acc (quiz)" not in found
    assert found["bytes read"] == ["256.0 MiB", "128.0 MiB"]
    assert found["layout"] == ["no parallelism", "expert=2"]


def test_the_routers_stand_beside_the_load(run_dir: Path) -> None:
    """The rows show means over layers with experts, the sum of dead experts, and a dash if a step was not measured."""
    first = {"dead_experts": [1, 2, None], "dropped": [0.0, 0.5, None], "expert_distance": [0.25, 0.75, None]}
    last = {"dead_experts": [0, 0, None], "dropped": [0.0, 0.125, None]}
    add_to_steps(run_dir, {"router": first}, {}, {"router": last})
    found = rows(write_report(run_dir))
    assert found["dead experts in all layers (below 1 % of a balanced load)"] == ["3", "0"]
    worst = json.loads((run_dir / "results.json").read_text())["training"]["pretrain"]["expert_load"]["worst"]
    assert worst == {"max_violation": pytest.approx(1.8), "step": 1, "layer": 0, "dead_experts": 3}
    assert found["share of token slots dropped"] == ["0.25", "0.0625"]
    assert found["relative distance of experts from their mean (0: copies)"] == ["0.5", "-"]


def test_fp8_losses_are_shown_for_first_and_last_step(run_dir: Path) -> None:
    assert "FP8, first step" not in write_report(run_dir).read_text()
    first = {"input": {"amax": 3.0, "underflow": 0.25}, "gradient": {"amax": 0.5, "underflow": 0.0}}
    last = {"input": {"amax": 4.0, "underflow": 0.125}, "gradient": {"scale_inv_max": 2.0}}
    add_to_steps(run_dir, {"fp8": first}, {"fp8": last})
    found = rows(write_report(run_dir))
    assert found["input of the trained MoE"] == ["3 / 4", "0.25 / 0.125", "- / -"]
    assert found["gradient of the trained MoE"] == ["0.5 / -", "0 / -", "- / 2"]


def test_settings_that_were_changed_in_a_started_run_are_listed(run_dir: Path) -> None:
    assert "changed after the start" not in write_report(run_dir).read_text()
    stage = StageFolder(run_dir, "pretrain")
    for steps in (1000, 500):
        stage.start({}, setting_texts({"pretrain": {"log.ckpt.every_n_train_steps": steps}}), resumable=True)
    listed = {name.replace("\\", ""): cells for name, cells in rows(write_report(run_dir)).items()}
    before, after, _ = listed["pretrain.log.ckpt.every_n_train_steps"]
    assert (before, after) == ("1000", "500")


def test_stages_are_in_the_order_of_their_needs(run_dir: Path) -> None:
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


def rewind_once(run_dir: Path) -> None:
    """Write the files of a training that was rewound from step 3 to step 1."""
    folder = run_dir / "pretrain"
    earlier = folder / "branches/1"
    earlier.mkdir(parents=True)
    (earlier / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().replace('"loss": 2.75', '"loss": 9'))
    begin_branch(folder, Branch(2, 1, ((2, 2),), changes={"optim.config.lr": ("1e-4", "5e-5")}, time="today"))
    end_move(folder)


def test_a_rewound_training_lists_its_branches(run_dir: Path) -> None:
    rewind_once(run_dir)
    shown = rows(write_report(run_dir))
    assert shown["trained MoE, branch 1"] == ["3", "9", "-"]
    second = "trained MoE, branch 2, from step 1, without the samples of step 2, optim.config.lr 1e-4 -\\> 5e-5"
    assert shown[second] == ["3", "2.75", "today"]


def test_the_loss_curve_shows_earlier_branches(run_dir: Path) -> None:
    rewind_once(run_dir)
    curves = read_run(run_dir).curves
    lines = {line.get_label(): line for line in loss_figure(curves).axes[0].lines}
    assert lines["MoE, training, branch 1"].get_xydata().tolist() == [[1000, 3.25], [2000, 3.0], [3000, 9.0]]
    assert lines["MoE, training"].get_ydata()[-1] == 2.75
