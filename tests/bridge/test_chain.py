"""Chain tests that only Bridge needs: HybridModels, any layout at step 0, trainings that end with an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.trainers.bridge.training import BridgeTraining
from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import differences
from tests.contract.test_mistakes import OWN
from tests.contract.trainers import losses, metrics, train, write_plan
from tests.distributed.ranks import run_ranks
from tests.functional.stages import run_stages
from tests.functional.started import NEMO, ROOT, STAGE, Command, environment
from tests.package_copy import copy_without_nemo
from tests.parents import write_mixtral
from tests.waiting import HANG_S


def plan_of(inputs: Path, run_dir: Path, *settings: str, recipe: str = "tiny") -> RunPlan:
    """Write the plan of a chain on two ranks, without a baseline."""
    training = BridgeTraining(f"tests.bridge.recipes:{recipe}", settings, nodes=1, ranks_per_node=2)
    named = [inputs / name for name in ("parent", "blend", "evaluation.yaml")]
    return write_plan(run_dir, *named, training.to_text())


def test_each_form_of_a_model_goes_through_the_chain_alike(inputs: Path, tmp_path: Path) -> None:
    stages = ("import", "data", "upcycle", "pretrain")
    forms = ("tiny", "tiny_hybrid", "tiny_builder")
    for recipe in forms:
        plan_of(inputs, tmp_path / recipe, recipe=recipe)
        run_stages(tmp_path / recipe, stages, ranks=2)
        assert read_json(tmp_path / recipe / "receipt.json")["within_tolerance"] is True
    for form in forms[1:]:
        assert differences(tmp_path / "tiny/upcycle/hf", tmp_path / form / "upcycle/hf") == []
        own, other = (tmp_path / recipe / "pretrain" for recipe in (form, "tiny"))
        assert losses(own) == pytest.approx(losses(other), rel=1e-5)
        assert all(len(line["router"]["load_cv"]) == 4 for line in metrics(own))


def test_the_chain_runs_without_the_folders_of_nemo(inputs: Path, tmp_path: Path) -> None:
    plan_of(inputs, tmp_path / "run", "model.expert_model_parallel_size=1")
    places = os.pathsep.join(map(str, (copy_without_nemo(tmp_path), ROOT)))
    for stage in ("import", "data", "upcycle", "pretrain", "dense_ct", "export"):
        words = [sys.executable, "-P", "-m", "nemo_upcycle.pipeline", stage, str(tmp_path / "run")]
        variables = environment() | {"PYTHONPATH": places}
        done = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=HANG_S, check=False)
        assert done.returncode == 0, done.stderr
        assert f"[{stage}] done in" in done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True},
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|ttL"},
        {"context_parallel_size": 2},
    ],
    ids=str,
)
def test_step_0_is_checked_on_one_rank_whatever_the_layout(inputs: Path, settings: dict[str, object]) -> None:
    assert run_ranks(_build_for_step_0, 1, inputs / "parent", settings, process_group=False) == [4]


def _build_for_step_0(parent: Path, settings: dict[str, object]) -> int:
    from nemo_upcycle import UpcycleSpec, open_dense
    from nemo_upcycle.cpu.one_rank import one_rank
    from nemo_upcycle.trainers.bridge.models import upcycled_provider
    from nemo_upcycle.trainers.paged_models import paged_megatron

    spec = UpcycleSpec(num_experts=4, top_k=2)
    config = upcycled_provider(parent, spec, seq_length=64)
    for name, value in settings.items():
        setattr(config, name, value)
    with open_dense(parent) as dense, one_rank():
        paged, _ = paged_megatron(config, dense, spec)
        return len(paged.model.decoder.layers)


#: Stages before the training stage. The training stage then runs in its own process.
BEFORE = ("import", "data", "upcycle")
ALONE = ("train.exit_signal_handler=true", "model.expert_model_parallel_size=1", "validation.eval_iters=0")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_fails_ends(inputs: Path, tmp_path: Path, workers: int) -> None:
    """The training's data loaders end too, although they were told to ignore SIGTERM."""
    settings = [*ALONE, f"dataset.num_workers={workers}", "checkpoint.save_interval=1"]
    plan_of(inputs, tmp_path, *settings, *([] if workers else ["dataset.persistent_workers=false"]))
    run_stages(tmp_path, BEFORE)
    (tmp_path / "pretrain/checkpoints").mkdir(parents=True)
    (tmp_path / "pretrain/checkpoints/iter_0000001").write_text("where the first checkpoint would be a folder")
    command = [*STAGE, "pretrain", tmp_path]
    job = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_S, check=False)
    assert job.returncode == 1
    assert "FileExistsError" in job.stderr.rstrip().splitlines()[-1]


def test_the_command_runs_a_part_of_the_chain(inputs: Path, tmp_path: Path) -> None:
    """Use a user's own recipe that names the parent by a symbolic link and sets no tokenizer."""
    (tmp_path / "link").symlink_to(inputs / "parent")
    (tmp_path / "own.py").write_text(OWN.replace("FILES", str(tmp_path)))
    words = [f"dense={inputs / 'parent'}", f"data={inputs / 'blend'}", f"evaluation={inputs / 'evaluation.yaml'}"]
    words += ["recipe=own:linked", "gpus=2", "pretrain.train.train_iters=2", "dir=run", "--until", "pretrain", "--yes"]
    typed = (tmp_path / "console.txt", NEMO, "upcycle", "pipeline", *words)
    done = Command(*typed)
    assert done.wait() == 0, done.text()
    assert "train.train_iters: 2\n" in (tmp_path / "run/recipes/pretrain.yaml").read_text()
    assert [line["step"] for line in metrics(tmp_path / "run/pretrain")] == [1, 2]
    again = Command(*typed)
    assert again.wait() == 0
    assert "[pretrain] done earlier" in again.text()


def test_a_baseline_of_a_parent_with_experts_keeps_them(tmp_path: Path) -> None:
    parent = write_mixtral(tmp_path / "parent", vocab_size=259)
    model = BridgeTraining("tests.bridge.recipes:tiny_grown", ranks_per_node=2, changes="null").config(parent).model
    assert (model.num_moe_experts, model.moe_router_topk, model.expert_model_parallel_size) == (4, 2, 2)
    assert model.moe_ffn_hidden_size == 96


def test_a_recipe_named_again_trains_its_parent_as_the_baseline(inputs: Path, tmp_path: Path) -> None:
    recipe, settings = "tests.bridge.recipes:tiny", ("train.train_iters=2",)  # the recipe uses expert parallelism
    trained = {}
    for changes in ("{}", "null"):
        training = BridgeTraining(recipe, settings, ranks_per_node=2, changes=changes)
        train(training.to_text(), tmp_path / changes, inputs / "parent", inputs / "blend", ranks=2)
        trained[changes] = metrics(tmp_path / changes)
    assert ["router" in lines[0] for lines in trained.values()] == [True, False]
    assert trained["null"][0]["loss"] == pytest.approx(trained["{}"][0]["loss"], rel=1e-5)
