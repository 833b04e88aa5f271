"""Fine-tuning on packed conversations on real ranks: the tokens in the loss, layouts, the chain, kill and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.evaluation.heldout import ANSWER_BITS
from nemo_upcycle.pipeline.checks import check_asked
from nemo_upcycle.reporting.markdown import label
from nemo_upcycle.utils.files import read_json
from tests.contract.packs import answer_loss, write_packs
from tests.contract.trainers import IS_BRIDGE, differing, losses, train, training_text, weights, write_plan
from tests.functional.stages import run_stages
from tests.tiers import quick


pytestmark = pytest.mark.slow
#: Settings that avoid padding rows, which a loss would count. NeMo pads the vocabulary; Bridge does not.
UNPADDED = {} if IS_BRIDGE else {"model.make_vocab_size_divisible_by": 260}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent, and packs of conversations for it."""
    return write_packs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one_rank(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of four uninterrupted steps on one rank."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(training_text({"steps": 4}, kind="moe_sft"), folder, *inputs)
    return folder


def test_the_first_loss_is_the_parents_on_answers_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The parent in Hugging Face reads one conversation at a time; the upcycled model reads packs of several."""
    settings = {"steps": 1, "lr": 0.0, "min_lr": 0.0} | UNPADDED
    train(training_text(settings, kind="moe_sft"), tmp_path / "run", *inputs)
    expected = answer_loss(inputs[0], inputs[1] / "validation.npy")
    assert losses(tmp_path / "run", "validation_loss")[-1] == pytest.approx(expected, abs=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("divided", quick(["ep", "tp", "pp", "data"], "ep"))
def test_losses_do_not_depend_on_the_layout(
    inputs: tuple[Path, Path], one_rank: Path, tmp_path: Path, divided: str
) -> None:
    layout = {} if divided == "data" else {divided: 2}
    train(training_text({"steps": 4} | layout, kind="moe_sft", ranks=2), tmp_path / "run", *inputs, ranks=2)
    for name in ("loss", "validation_loss"):
        assert losses(tmp_path / "run", name) == pytest.approx(losses(one_rank, name), abs=2e-4), name
    assert losses(one_rank)[-1] < losses(one_rank)[0] - 0.1


@pytest.mark.full
def test_a_resumed_tuning_ends_with_the_same_bits(inputs: tuple[Path, Path], one_rank: Path, tmp_path: Path) -> None:
    text = training_text({"steps": 4}, kind="moe_sft")
    with pytest.raises(RuntimeError, match="rank 0 died"):
        train(text, tmp_path / "run", *inputs, kill_at=4)
    train(text, tmp_path / "run", *inputs)
    assert differing(weights(one_rank), weights(tmp_path / "run")) == []


@pytest.mark.full
def test_a_killed_tuning_chain_resumes_and_compares_four_models(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    parent, _ = inputs
    (tmp_path / "asked.yaml").write_text("tasks: {heldout_answers: [0]}\nlocal: true\nheldout: {answers: 8}\n")
    lines = parent.parent / "sums.jsonl"
    (tmp_path / "sums.yaml").write_text(f"files: [{lines}]\nvalidation: 0.1\nheldout: 0.1\n")
    texts = [training_text(kind=kind, ranks=2) for kind in ("moe_sft", "dense_sft")]
    run = tmp_path / "run"
    plan = write_plan(run, parent, tmp_path / "sums.yaml", tmp_path / "asked.yaml", *texts)
    assert plan.inputs.reads_chat
    check_asked(plan.inputs)
    run_stages(run, ranks=2, killed={"pretrain": ("pretrain/metrics.jsonl", 4)})
    results = read_json(run / "results.json")
    bits = {name: values[ANSWER_BITS]["value"] for name, values in results["evaluation"].items()}
    assert bits["step0"] == pytest.approx(bits["dense"], abs=1e-4)
    assert bits["trained"] < bits["dense"]
    assert bits["dense_ct"] < bits["dense"]
    assert results["paired"]["trained_minus_dense_ct"][ANSWER_BITS]["clusters"] >= 5
    assert results["training"]["pretrain"]["settings"]["data"].startswith("conversations sums, ")
    assert "conversations sums, " in (run / "hf/README.md").read_text()
    assert label(ANSWER_BITS) in (run / "report.md").read_text()
