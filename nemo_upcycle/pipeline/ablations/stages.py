"""The plan of a grid, and its stages: a parent, data, one training for each arm and seed, and the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from nemo_upcycle.pipeline.data_stage import data_files, data_folder_of, require_data
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.markers import STEPS, StageFolder
from nemo_upcycle.pipeline.outputs import checkpoint_files, require_kept, weights_in
from nemo_upcycle.pipeline.plan import Stage, WorkPlan, required_training
from nemo_upcycle.reporting.grid_evidence import PLAN as GRID
from nemo_upcycle.trainers.base import last_checkpoint


#: Name of the stage that draws random weights. An arm with this parent is trained from scratch.
UNTRAINED = "untrained"
#: Path, in the grid's folder, of the suite that scores all trainings.
SUITE = "suite/items"


@dataclass(frozen=True)
class GridPlan(WorkPlan):
    """Everything that the stages of a grid need, as plain values.

    Args:
        name: name of the grid.
        dense: address of the dense parent; "" if the grid trains its own.
        data: a blend, or a finished folder.
        parent: serialised recipe that trains the parent from random weights; None if `dense` is set. If no training
            starts from this parent, only the recipe's model sizes are used.
        vocabulary: vocabulary size of the parent's tokenizer, which is trained on the blend.
        suite: suite that scores all trainings: a name in `conf/evaluation`, or a YAML file.
        cells: serialised recipe of each training, by the training's name.
        described: facts for the table: the references, the margin, the description of each arm, and facts of each
            cell. The facts of a cell are its arm, seed, tokens per step, steps and learning-rate schedule. If a cell
            has its own parent, `read_grid` adds further facts.
        trainer: trainer of all cells, `nemo` or `bridge`.
        parents: the training whose result is a training's parent, or UNTRAINED, by the training's name. A training
            that is not listed starts from the grid's parent.
    """

    file: ClassVar[str] = GRID
    kind: ClassVar[str] = "a grid of ablations"
    files: ClassVar[Mapping[str, str]] = {"data": "data", "suite": "evaluation"}

    name: str
    dense: str
    data: str
    parent: str | None
    vocabulary: int | None
    suite: str
    cells: dict[str, str]
    described: dict[str, Any]
    trainer: str = "nemo"
    parents: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `WorkPlan.stages`."""
        return stages_of(self)

    def training_text(self, stage: str) -> str | None:
        """See `WorkPlan.training_text`."""
        return self.parent if stage == "parent" else self.cells.get(stage)

    @cached_property
    def inputs(self) -> Inputs:
        """See `WorkPlan.inputs`."""
        return Inputs(self.dense, self.data, self.suite)


def stages_of(plan: GridPlan) -> tuple[Stage, ...]:
    """Return the stages of a grid, each after the stages that it needs."""
    trains_parent = plan.parent and len(plan.parents) < len(plan.cells)
    first: tuple[Stage, ...]
    if plan.parent:
        first = (
            Stage(
                UNTRAINED,
                untrained_stage,
                (),
                ("parent", "vocabulary", "data"),
                content=_weights,
                outputs=lambda run, _: require_kept(run / UNTRAINED / "hf", run),
            ),
            Stage("data", data_stage, (UNTRAINED,), ("data",), resumable=True, content=_tokens, outputs=_blend),
        )
    else:
        first = (
            Stage("dense", import_stage, (), ("dense",), content=_weights, outputs=_parent("dense")),
            Stage("data", data_stage, ("dense",), ("data",), resumable=True, content=_tokens, outputs=_blend),
        )
    if trains_parent:
        first += (
            _train("parent", parent_stage, (UNTRAINED, "data"), is_read=True),
            _export("dense", "parent"),
        )
    cells: list[Stage] = []
    for name in plan.cells:
        needs = (_start_of(plan, name), "data", "suite")
        is_parent = name in plan.parents.values()
        cells.append(_train(name, _training(name), needs, is_read=is_parent))
        cells += [_export(_exported(name), name)] if is_parent else []
    return (
        *first,
        Stage(
            "suite", suite_stage, ("data",), ("suite",), content=lambda run, *_: sorted((run / SUITE).glob("*.jsonl"))
        ),
        *cells,
        Stage("table", table_stage, tuple(plan.cells), ("described",)),
    )


def _start_of(plan: GridPlan, cell: str) -> str:
    """Return the name of the stage that provides the dense model from which a training starts."""
    parent = plan.parents.get(cell)
    return "dense" if parent is None else parent if parent == UNTRAINED else _exported(parent)


def _exported(cell: str) -> str:
    """Return the name of the stage that exports a training from which other trainings start."""
    return f"{cell}-hf"


def _export(name: str, trained: str) -> Stage:
    """Return the stage that exports a dense model trained by the grid."""

    def work(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
        """Export a parent."""
        import torch

        from nemo_upcycle.convert.export import export_checkpoint

        folder = run_dir / name / "hf"
        checkpoint = last_checkpoint(run_dir / trained)
        export_checkpoint(checkpoint, run_dir / UNTRAINED / "hf", folder, dtype=torch.float32)
        return {"folder": str(folder)}

    return Stage(name, work, (trained,), (), reads=(UNTRAINED, trained), content=_weights, outputs=_parent(name))


def _parent(name: str) -> Callable[[Path, GridPlan], None]:
    return lambda run_dir, _: require_kept(parent_folder(run_dir, name), run_dir)


def _train(name: str, work: Callable[[Path, Any], dict[str, Any]], after: tuple[str, ...], *, is_read: bool) -> Stage:
    """Return the stage of a training. If `is_read`, other stages identify the result by the checkpoint's files."""
    stage = Stage(name, work, after, (name, name + STEPS), parallel=True, resumable=True)
    if not is_read:
        return stage
    return replace(
        stage,
        content=lambda run_dir, *_: checkpoint_files(run_dir / name),
        outputs=lambda run_dir, _: last_checkpoint(run_dir / name),
    )


def _weights(_: Path, __: GridPlan, outputs: Mapping[str, Any]) -> list[Path]:
    return weights_in(Path(outputs["folder"]))


def _tokens(run_dir: Path, plan: GridPlan, _: Mapping[str, Any]) -> list[Path]:
    return data_files(data_folder_of(run_dir, plan))


def _blend(run_dir: Path, plan: GridPlan) -> None:
    require_data(plan, data_folder_of(run_dir, plan))


def _training(name: str) -> Callable[[Path, GridPlan], dict[str, Any]]:
    def work(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
        """Train one arm with one seed."""
        folders = parent_folder(run_dir, _start_of(plan, name)), data_folder_of(run_dir, plan)
        return required_training(plan, name).train(run_dir / name, *folders, suite=run_dir / SUITE)

    return work


def parent_folder(run_dir: Path, stage: str) -> Path:
    """Return a parent's folder, as its stage reported it."""
    return Path(StageFolder(run_dir, stage).outputs()["folder"])


def import_stage(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
    """Import the dense parent."""
    from nemo_upcycle.sources.fetch import import_dense

    return {"folder": str(import_dense(plan.dense, run_dir / "dense" / "hf").resolve())}


def untrained_stage(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
    """Train a tokenizer on the blend, and draw the parent's random weights."""
    from nemo_upcycle.pipeline.ablations.untrained import write_untrained
    from nemo_upcycle.trainers.nemo.recipes import load_recipe

    assert plan.parent is not None
    assert plan.vocabulary is not None
    assert plan.inputs.blend is not None  # `read_grid` refuses a finished folder if the grid trains the parent
    folder = run_dir / UNTRAINED / "hf"
    config = load_recipe(plan.parent).model.config
    write_untrained(folder, config, plan.inputs.blend, plan.vocabulary, run_dir / UNTRAINED)
    return {"folder": str(folder)}


def data_stage(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
    """Clean the blend and tokenise it with the parent's tokenizer, or use a finished folder in place."""
    from nemo_upcycle.data.finished import open_blend
    from nemo_upcycle.pipeline.data_stage import build_data, made_data

    first = UNTRAINED if plan.parent else "dense"
    tokenizer = StageFolder(run_dir, first).outputs()["folder"]
    folder = data_folder_of(run_dir, plan)
    if not plan.inputs.is_finished:
        length = max(one.seq_length(Path(tokenizer)) for one in plan.trainings.values())
        build_data(plan.data, tokenizer, folder, length)
    open_blend(folder).require_tokenizer_of(tokenizer)
    return made_data(folder, open_blend(folder).manifest)


def suite_stage(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
    """Build the suite that scores all trainings."""
    from nemo_upcycle.data.finished import open_blend
    from nemo_upcycle.data.suites.suite import build_named_suite

    build_named_suite(plan.suite, open_blend(data_folder_of(run_dir, plan)).heldout(), run_dir / SUITE)
    return {"folder": str(run_dir / SUITE)}


def parent_stage(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
    """Train the parent from random weights."""
    training = required_training(plan, "parent")
    return training.train(run_dir / "parent", run_dir / UNTRAINED / "hf", data_folder_of(run_dir, plan))


def table_stage(run_dir: Path, plan: GridPlan) -> dict[str, Any]:
    """Compare the arms: table.md, table.json and figures."""
    from nemo_upcycle.reporting.grid_table import write_table

    return {"table": str(write_table(run_dir, plan.name, plan.described))}
