"""The plan of a run, and the table of its stages.

Every stage can be run separately, and more than once. Each stage imports the heavy libraries that it needs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from nemo_upcycle.data.chat.finished import open_data
from nemo_upcycle.errors import StageError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.online.receipt import read_receipt, recorded_spec
from nemo_upcycle.pipeline.data_stage import (
    data_files,
    data_folder_of,
    data_stage,
    dense_folder_of,
    require_data,
    sample_tokens,
)
from nemo_upcycle.pipeline.disk_use import DiskUse, blend_use, model_use
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.markers import STEPS
from nemo_upcycle.pipeline.outputs import checkpoint_files, require_kept, weights_in
from nemo_upcycle.pipeline.plan import PLAN, Stage, WorkPlan, required_training
from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.trainers.run_calibration import take_calibration, with_calibration
from nemo_upcycle.utils.files import read_json


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan(WorkPlan):
    """Everything that the stages of a run need, as plain values.

    Recipes are texts; a recipe for NeMo is in NeMo-Run's serialised form. A stage builds its recipe only after the
    check that the stage may start.

    Args:
        recipe: name of the upcycling recipe, for titles.
        dense: address of the dense parent.
        data: a blend (a name in `conf/data`, or a YAML file), or a finished folder of `nemo-upcycle data`; for
            fine-tuning, conversations: a folder of `nemo-upcycle chat`, a name in `conf/chat`, a YAML file, or JSON
            lines.
        evaluation: a name in `conf/evaluation`, or a YAML file.
        pretrain: recipe of the upcycled model, as its trainer serialises it.
        dense_ct: recipe of the dense baseline; None omits the baseline.
        trainer: `nemo` or `bridge`.
        notify: the user's command to run at each stop and after the stage `last`; empty if there is none.
        last: name of the last stage that the command of this run asked for.
    """

    file: ClassVar[str] = PLAN
    kind: ClassVar[str] = "a run of the pipeline"
    files: ClassVar[Mapping[str, str]] = {"data": "data", "evaluation": "evaluation"}

    recipe: str
    dense: str
    data: str
    evaluation: str
    pretrain: str
    dense_ct: str | None
    trainer: str = "nemo"
    notify: str = ""
    last: str = ""

    def setting(self, name: str) -> Any:
        """See `WorkPlan.setting`. The name "step 0" stands for the settings that the step-0 check depends on."""
        return self.training_settings("pretrain").step0 if name == "step 0" else super().setting(name)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `WorkPlan.stages`: the chain."""
        return STAGES

    def training_text(self, stage: str) -> str | None:
        """See `WorkPlan.training_text`."""
        return {"pretrain": self.pretrain, "dense_ct": self.dense_ct}.get(stage)

    @cached_property
    def inputs(self) -> Inputs:
        """See `WorkPlan.inputs`."""
        return Inputs(self.dense, self.data, self.evaluation)


def import_stage(run_dir: Path, plan: RunPlan) -> dict[str, Any]:
    """Import the dense parent."""
    from nemo_upcycle.sources.fetch import import_dense

    return {"dense_folder": str(import_dense(plan.dense, run_dir / "dense").resolve())}


def upcycle_stage(run_dir: Path, plan: RunPlan) -> dict[str, Any]:
    """Upcycle once in float32, compare the result with the parent, and keep the step-0 model."""
    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.models.hf_model import require_known
    from nemo_upcycle.trainers.equivalence import check_step0

    use_cpu_backend()  # must be first, because Megatron checks it when the model's configuration is built
    training, dense_folder = required_training(plan, "pretrain"), dense_folder_of(run_dir)
    spec = training.spec(dense_folder)
    spec = with_calibration(spec, run_dir / "upcycle", dense_folder, started=False) or spec
    receipt = check_step0(
        training.model_config(dense_folder, dense=False),
        training.model_config(dense_folder, dense=True),
        dense_folder,
        spec,
        sample_tokens(data_folder_of(run_dir, plan)),
        run_dir / "upcycle" / "hf",
    )
    require_known(run_dir / "upcycle" / "hf")  # else the chain would fail only at evaluation, after its trainings
    receipt.write(run_dir / "receipt.json")
    result = receipt.equivalence
    if receipt.exact and not result["within_tolerance"]:
        differences = enumerate(result["layer_relative_diff"])
        first = next((f"at layer {number}" for number, value in differences if value > 1e-5), "after the last layer")
        raise StageError(
            "step-0 difference of the upcycled model",
            got=f"{result['max_abs_logit_diff']:.3g} (same kernels: {result['max_abs_logit_diff_same_stack']:.3g})",
            expected=f"at most {result['tolerance']:.3g} (same kernels: {result['tolerance_same_stack']:.3g})",
            fix=(
                f"look {first}, where the models first differ, and compare the model's configuration with the parent's"
            ),
        )
    return result


def _exported(run_dir: Path, plan: RunPlan) -> list[Path]:
    return [run_dir / "hf", *([run_dir / "dense_ct" / "hf"] if plan.dense_ct else [])]


def _require_exported(run_dir: Path, plan: RunPlan) -> None:
    for folder in _exported(run_dir, plan):
        require_kept(folder, run_dir)


def pretrain_stage(run_dir: Path, plan: RunPlan) -> dict[str, Any]:
    """Upcycle online inside the training job, and continue pretraining."""
    take_calibration(run_dir / "upcycle", run_dir / "pretrain")
    return _train(run_dir, plan, "pretrain")


def dense_ct_stage(run_dir: Path, plan: RunPlan) -> dict[str, Any]:
    """Continue pretraining the parent on the same data."""
    if not plan.dense_ct:
        logger.info(
            "[dense_ct] omitted; dense_ct=RECIPE trains it, so that the report shows the effect of training alone"
        )
        return {"left_out": True}
    return _train(run_dir, plan, "dense_ct")


def _train(run_dir: Path, plan: RunPlan, name: str) -> dict[str, Any]:
    training = required_training(plan, name)
    return training.train(run_dir / name, dense_folder_of(run_dir), data_folder_of(run_dir, plan))


def export_stage(run_dir: Path, plan: RunPlan) -> dict[str, Any]:
    """Export the trained models to Hugging Face folders."""
    from nemo_upcycle.convert.export import CardInfo, export_checkpoint
    from nemo_upcycle.convert.model_card import spec_fact, training_facts
    from nemo_upcycle.convert.proof import prove, record, said
    from nemo_upcycle.sources.checkpoints import steps_in

    dense_folder = dense_folder_of(run_dir)
    receipt = run_dir / "pretrain" / "receipt.json"  # the receipt has the spec, so no recipe has to be loaded
    spec = recorded_spec(read_receipt(receipt).get("spec"), receipt, {})
    data = {"Data": open_data(data_folder_of(run_dir, plan)).card}

    def export(stage: str, output: Path, title: str, **options: Any) -> str:
        checkpoint = last_checkpoint(run_dir / stage)
        training = training_facts(run_dir / stage / "metrics.jsonl", steps_in(checkpoint))
        facts = (spec_fact(options["spec"]) if options else {}) | data | training
        about = CardInfo(title=title, facts=facts, parent=plan.dense)
        folder = export_checkpoint(checkpoint, dense_folder, output, about=about, **options)
        proof = prove(folder, None)
        record(folder, proof)
        logger.info("[export] %s", said(proof))
        return str(folder)

    title = run_dir.name if ":" in plan.recipe else plan.recipe  # `module:function` is no title for readers
    folders = {"trained": export("pretrain", run_dir / "hf", title, spec=spec)}
    if plan.dense_ct:
        folders["dense_ct"] = export("dense_ct", run_dir / "dense_ct" / "hf", f"{title}: baseline")
    return folders


def evaluate_stage(run_dir: Path, plan: RunPlan) -> dict[str, Any]:
    """Evaluate parent, step 0, the trained model and the baseline on the same items."""
    from nemo_upcycle.data.suites.suite import build_named_suite, load_suite_tasks
    from nemo_upcycle.evaluation.backends import ModelOptions
    from nemo_upcycle.evaluation.run import evaluate
    from nemo_upcycle.reporting.run_folder import MODELS

    suite = run_dir / "suite"
    build_named_suite(plan.evaluation, output=suite, **open_data(data_folder_of(run_dir, plan)).held_out)
    tasks = load_suite_tasks(suite)  # loaded once, so that every model gets the same questions
    dense_folder = dense_folder_of(run_dir)
    models = {
        "dense": dense_folder,
        "step0": run_dir / "upcycle" / "hf",
        "trained": run_dir / "hf",
        "dense_ct": run_dir / "dense_ct" / "hf",
    }
    if plan.inputs.suite_config.backend == "megatron":  # score the checkpoints as they were trained
        models |= {"trained": last_checkpoint(run_dir / "pretrain"), "dense_ct": run_dir / "dense_ct"}
    if not plan.dense_ct:
        del models["dense_ct"]
    options = ModelOptions(megatron={"dense": str(dense_folder)})
    for number, (name, folder) in enumerate(models.items(), 1):
        logger.info("[evaluate] model %d of %d: %s (%s), %s", number, len(models), name, MODELS[name], folder)
        samples = name != "step0"  # step 0 would write the same texts as the parent
        evaluate(folder, suite, run_dir / "evaluation", name=name, samples=samples, tasks=tasks, options=options)
    return {name: str(folder) for name, folder in models.items()}


def report_stage(run_dir: Path, plan: RunPlan) -> dict[str, Any]:
    """Write report.md, report.html, results.json and the figures."""
    from nemo_upcycle.reporting.report import write_report

    return {"report": str(write_report(run_dir, _planned(run_dir, plan)))}


def _planned(run_dir: Path, plan: RunPlan) -> dict[str, dict[str, float]]:
    """Return the planner's memory and speed for each training that ran on a GPU known to the planner."""
    from nemo_upcycle.pipeline.forecast.recipe_to_plan import planned_of

    planned = {}
    for stage in (stage.name for stage in STAGES if stage.parallel):
        settings = run_dir / stage / "training.json"
        device = read_json(settings).get("card") if settings.is_file() else None
        if not device or not (training := plan.training(stage)):  # load a recipe only if the training ran on a GPU
            continue
        if values := planned_of(training.facts(plan.inputs.parent), device):
            planned[stage] = values
    return planned


def _import_disk(_: Path, plan: RunPlan, models: Mapping[str, Architecture | None]) -> list[DiskUse]:
    if not plan.dense.startswith("asset://"):
        return []  # the parent's files stay where they are
    moe = models["pretrain"]
    return [model_use("import", "parent", moe and moe.dense)]


def _data_disk(run_dir: Path, plan: RunPlan, models: Mapping[str, Architecture | None]) -> list[DiskUse]:
    blend = plan.inputs.blend
    return [blend_use("data", blend, models["pretrain"], data_folder_of(run_dir, plan))] if blend else []


def _export_disk(_: Path, __: RunPlan, models: Mapping[str, Architecture | None]) -> list[DiskUse]:
    return [model_use("export", f"exported model of {name}", arch) for name, arch in models.items()]


#: All stages of the chain, each after the stages that it needs. This is the only list of the chain's stages.
STAGES = (
    Stage(
        "import",
        import_stage,
        (),
        ("dense",),
        content=lambda _, __, outputs: weights_in(Path(outputs["dense_folder"])),
        outputs=lambda run, _: require_kept(dense_folder_of(run), run),
        disk=_import_disk,
    ),
    Stage(
        "data",
        data_stage,
        ("import",),
        ("data",),
        resumable=True,
        content=lambda run, plan, _: data_files(data_folder_of(run, plan)),
        outputs=lambda run, plan: require_data(plan, data_folder_of(run, plan)),
        disk=_data_disk,
    ),
    Stage(
        "upcycle",
        upcycle_stage,
        ("import", "data"),
        ("step 0",),
        content=lambda run, *_: weights_in(run / "upcycle" / "hf"),
        outputs=lambda run, _: require_kept(run / "upcycle" / "hf", run),
        disk=lambda _, __, models: [model_use("upcycle", "model of step 0", models["pretrain"])],
    ),
    Stage(
        "pretrain",
        pretrain_stage,
        ("import", "data", "upcycle"),
        ("pretrain", "pretrain" + STEPS),
        parallel=True,
        resumable=True,
        reads=("import", "data"),
        content=lambda run, *_: checkpoint_files(run / "pretrain"),
        outputs=lambda run, _: last_checkpoint(run / "pretrain"),
    ),
    Stage(
        "dense_ct",
        dense_ct_stage,
        ("import", "data"),
        ("dense_ct", "dense_ct" + STEPS),
        parallel=True,
        resumable=True,
        content=lambda run, plan, _: checkpoint_files(run / "dense_ct") if plan.dense_ct else (),
        outputs=lambda run, plan: plan.dense_ct and last_checkpoint(run / "dense_ct"),
    ),
    Stage(
        "export",
        export_stage,
        ("pretrain", "dense_ct"),
        (),
        reads=("import", "data", "pretrain", "dense_ct"),
        content=lambda run, plan, _: weights_in(*_exported(run, plan)),
        outputs=_require_exported,
        disk=_export_disk,
    ),
    Stage("evaluate", evaluate_stage, ("import", "data", "upcycle", "export"), ("evaluation",), computes=True),
    Stage("report", report_stage, ("evaluate",), ()),
)
BY_NAME = {stage.name: stage for stage in STAGES}
