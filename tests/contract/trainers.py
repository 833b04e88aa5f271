"""Tiny trainings with this environment's trainer (NeMo or Megatron-Bridge), with the same setting names for both."""

from __future__ import annotations

import importlib
import importlib.util
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.pipeline.plan import open_training
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.sources.checkpoints import by_step, steps_in
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint
from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.trainers.settings import LR, MIN_LR, SAVE_EVERY, SETTINGS, STEPS, sizes_of
from tests.distributed.ranks import run_ranks
from tests.functional.stages import kill_when
from tests.functional.tiny import shrink


IS_BRIDGE = importlib.util.find_spec("megatron.bridge") is not None
TRAINER = "bridge" if IS_BRIDGE else "nemo"
#: Kind of training -> NeMo recipe that is shrunk; `tests.bridge.recipes` has a function for each kind.
RECIPES = {
    "moe": "smollm2_135m_e8t2",
    "dense_ct": "smollm2_135m_dense_ct",
    "moe_sft": "smollm2_135m_e8t2_sft",
    "dense_sft": "smollm2_135m_dense_sft",
}
WARMUP = next(row for row in SETTINGS if row.nemo == "optim.lr_scheduler.warmup_steps")
#: Prefixes of the settings of the model and of the spec.
_GROUPS = {"nemo": {"model": "model.config", "spec": "resume.restore_config.spec"}, "bridge": {}}


def setting_name(name: str) -> str:
    """Return the trainer's own name of a setting.

    Args:
        name: the planner's name of a layout size, one of `steps`, `save_every`, `lr`, `min_lr` and `warmup`,
            `model.FIELD`, `spec.FIELD`, or the trainer's own name of a setting.
    """
    rows = {"steps": STEPS, "save_every": SAVE_EVERY, "lr": LR, "min_lr": MIN_LR, "warmup": WARMUP}
    group, _, field = name.partition(".")
    if field:
        return f"{_GROUPS[TRAINER].get(group, group)}.{field}"
    return rows[name].of(TRAINER) if name in rows else sizes_of(TRAINER)[name]


def fp8(recipe: str) -> dict[str, Any]:
    """Return the settings of an FP8 training; NeMo runs no validation, because validation would change the scales."""
    values = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_amax_history_len": 16}
    still = {} if IS_BRIDGE else {"trainer.limit_val_batches": 0, "trainer.val_check_interval": 1}
    return {f"{'model' if IS_BRIDGE else 'trainer.plugins'}.{name}": value for name, value in values.items()} | still


def training_text(
    settings: Mapping[str, Any] | None = None,
    *,
    kind: str = "moe",
    ranks: int = 1,
    evaluate: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> str:
    """Return a training as a plan stores it: six steps, a checkpoint every two steps, a validation every three steps.

    Args:
        settings: values by the names of `setting_name`.
        kind: `moe`, `dense_ct`, `moe_sft` or `dense_sft`.
        ranks: ranks on this machine.
        evaluate: `suite` and `every_n_steps` of an evaluation of the live model.
        arguments: arguments of the recipe, only in NeMo.
    """
    given = {"steps": 6, "save_every": 2} | dict(settings or {})
    given |= {"sequence_parallel": True} if given.get("tp", 1) > 1 else {}
    values = {setting_name(name): value for name, value in given.items()}
    make = _bridge_text if IS_BRIDGE else _nemo_text
    return make(kind, ranks, values, dict(evaluate or {}), **arguments)


def _nemo_text(kind: str, ranks: int, values: dict[str, Any], evaluate: dict[str, Any], **arguments: Any) -> str:
    import nemo_run as run

    from nemo_upcycle.trainers.nemo.evaluating import EvaluateWhileTraining
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from nemo_upcycle.trainers.settings import setting
    from tests.golden import factory_of

    module = getattr(importlib.import_module("nemo_upcycle.recipes"), RECIPES[kind])
    recipe = shrink(factory_of(module)(num_gpus_per_node=ranks, **arguments), max_steps=6, checkpoint_every=2)
    trainer = recipe.trainer
    trainer.limit_val_batches, trainer.val_check_interval = 1.0 if "sft" in kind else 1, 3
    trainer.num_sanity_val_steps = 1
    recipe.log.ckpt.keep_last = 100
    for name, value in values.items():
        owner, _, last = name.rpartition(".")
        setattr(setting(recipe, owner), last, value)
    if evaluate:
        trainer.callbacks.append(run.Config(EvaluateWhileTraining, **evaluate))
    return dump_recipe(recipe)


def _bridge_text(kind: str, ranks: int, values: dict[str, Any], evaluate: dict[str, Any]) -> str:
    from nemo_upcycle.trainers.bridge.training import BridgeTraining

    if evaluate:
        values |= {"upcycle.evaluate_every": evaluate["every_n_steps"], "upcycle.evaluate_suite": evaluate["suite"]}
    changes = {name.removeprefix("spec."): values.pop(name) for name in [*values] if name.startswith("spec.")}
    words = tuple(f"{name}={value}" for name, value in values.items())
    recipe = f"tests.bridge.recipes:{kind}"
    return BridgeTraining(recipe, words, nodes=1, ranks_per_node=ranks, changes=json.dumps(changes)).to_text()


def write_plan(run_dir: Path, parent: Path, data: Path, evaluation: Path, *texts: str | None) -> RunPlan:
    """Write the plan of a chain.

    Args:
        run_dir: folder of the run.
        parent: dense parent.
        data: finished data, or a file that names them.
        evaluation: file of the suite.
        texts: the training of the upcycled model, and the training of its baseline.
    """
    moe, *others = texts
    dense_ct = others[0] if others else None
    recipe = json.loads(moe or "")["recipe"] if IS_BRIDGE else RECIPES["moe"]
    plan = RunPlan(recipe, str(parent), str(data), str(evaluation), moe or "", dense_ct, trainer=TRAINER)
    plan.write(run_dir)
    return plan


def train(text: str, folder: Path, parent: Path, data: Path, *, ranks: int = 1, kill_at: int = 0) -> None:
    """Train on several ranks.

    Args:
        text: training in the form of `training_text`.
        folder: folder of the stage.
        parent: dense parent.
        data: finished data.
        ranks: number of ranks in the training.
        kill_at: number of lines in `metrics.jsonl` at which a rank kills itself.
    """
    run_ranks(_train, ranks, text, folder, parent, data, kill_at, process_group=False)


def _train(text: str, folder: Path, parent: Path, data: Path, kill_at: int) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    if kill_at:
        threading.Thread(target=kill_when, args=(folder / "metrics.jsonl", kill_at), daemon=True).start()
    open_training(TRAINER, text).train(folder, parent, data)


def metrics(folder: Path, name: str = "loss") -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` that have a value with this name."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if name in line]


def losses(folder: Path, name: str = "loss") -> list[float]:
    """Return the values with this name, from every step or every validation."""
    return [line[name] for line in metrics(folder, name)]


def weights(folder: Path, steps: int | None = None) -> dict[str, torch.Tensor]:
    """Read the model's tensors from the checkpoint after `steps` steps, or from the last checkpoint."""
    saved = by_step(folder / "checkpoints")
    checkpoint = next(one for one in saved if steps_in(one) == steps) if steps else last_checkpoint(folder)
    with DistributedCheckpoint(checkpoint if IS_BRIDGE else checkpoint / "weights") as tensors:
        names = [name for name in tensors.names() if not any(part in name for part in ("optimizer", "rng", "_extra"))]
        assert names
        return {name: tensors.read(name) for name in names}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not bit-identical in two checkpoints."""
    return [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]
