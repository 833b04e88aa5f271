"""The recipe and the blend of a run, written as files for users to edit, and the command that runs them."""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.cli.start.choices import Choices
from nemo_upcycle.cli.start.parent import FoundParent
from nemo_upcycle.cli.start.texts import Texts
from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.commands import recomputation
from nemo_upcycle.utils.command_line import COMMAND, CommandLine, shown_program
from nemo_upcycle.utils.conf import conf_text
from nemo_upcycle.utils.writers import Code, literal, python_code


#: Names of the files in the folder of the run.
RECIPE, BLEND = "recipe.py", "blend.yaml"
#: Settings of an executor for GPUs that this machine lacks. The user replaces the words in capitals.
CLUSTER = (
    *("run.executor=slurm", "run.executor.account=ACCOUNT", "run.executor.partition=PARTITION"),
    "run.executor.container_image=IMAGE",
)
_NEMO = '''"""Upcycle a dense model with the settings below. `nemo-upcycle start` wrote this file; edit it freely."""

from pathlib import Path

import nemo_run as run

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.recipes import pipeline, upcycled_from

HERE = Path(__file__).resolve().parent
DENSE = {dense}
SPEC = UpcycleSpec({spec})


def training(spec):  # None: the dense baseline
    recipe = upcycled_from(
        DENSE, spec=spec, seq_length={seq_length}, global_batch_size={global_batch}, micro_batch_size={micro_batch},
        max_steps={steps}, lr={peak}, min_lr={end}, warmup_steps={warmup}, name={run},
        {arguments},
    ){settings}
    return recipe


@run.cli.factory(target=pipeline)
def chain() -> run.Partial:
    return run.Partial(
        pipeline, dir=str(HERE / {run}), dense=DENSE, data=str(HERE / {blend}), evaluation={suite},
        pretrain=training(SPEC), dense_ct=training(None),
    )
'''
_BRIDGE = '''"""Upcycle a dense model with the settings below. `nemo-upcycle start` wrote this file; edit it freely."""

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.bridge import upcycled_pretraining

DENSE = {dense}
SPEC = UpcycleSpec({spec})


def pretrain(spec=SPEC):
    config = upcycled_pretraining(
        DENSE, spec,
        {arguments},
    )
    train, optimizer, scheduler = config.train, config.optimizer, config.scheduler
    train.train_iters, train.global_batch_size, train.micro_batch_size = {steps}, {global_batch}, {micro_batch}
    optimizer.lr, optimizer.min_lr, scheduler.lr_warmup_iters = {peak}, {end}, {warmup}
    config.validation.eval_interval, config.validation.eval_iters = {validate_every}, {validations}
    config.checkpoint.save_interval, config.checkpoint.most_recent_k = {save_every}, 1
    return config


def dense_ct():  # the baseline
    return pretrain(None)
'''
#: parallel size -> argument of `upcycled_from`, and Megatron's setting
_SIZES = {
    "tp": ("tensor_parallelism", "tensor_model_parallel_size"),
    "pp": ("pipeline_parallelism", "pipeline_model_parallel_size"),
    "cp": ("context_parallelism", "context_parallel_size"),
    "ep": ("expert_parallelism", "expert_model_parallel_size"),
}


def run_name(parent: FoundParent, choices: Choices) -> str:
    """Return the name of the run's folder, which is also the title of its report.

    The name has the form of recipes' names: parent, number of experts, top-k.
    """
    return f"{parent.name}_e{choices.spec.num_experts}t{choices.spec.top_k}"


def recipe_text(parent: FoundParent, choices: Choices) -> str:
    """Return the text of the recipe for the chosen trainer."""
    values: dict[str, Any] = {
        "dense": parent.address,
        "spec": Code(", ".join(f"{name}={literal(value)}" for name, value in choices.spec_fields.items())),
        "micro_batch": choices.layout.micro_batch,
        "validate_every": 0 if choices.plan is None else min(max(1, choices.steps // 2), 500),
        "validations": 1 if choices.plan is None else 8,
        "save_every": min(choices.steps, paper.CHECKPOINT_STEPS),
        "run": run_name(parent, choices),
        "blend": BLEND,
        "suite": choices.suite,
        "peak": Code(f"{choices.peak:g}"),
        "end": Code(f"{choices.end:g}"),
    }
    values |= {name: getattr(choices, name) for name in ("seq_length", "global_batch", "steps", "warmup")}
    arguments, settings = _FORMS[choices.trainer][1](choices)
    more = "".join(f"\n    {setting}" for setting in settings)
    behind = textwrap.fill(", ".join(arguments), 110, subsequent_indent=" " * 8, break_long_words=False)
    return python_code(_FORMS[choices.trainer][0], **values, arguments=Code(behind), settings=Code(more))


def _of_nemo(choices: Choices) -> tuple[list[str], list[str]]:
    """Return the arguments for the layout, and the lines that follow the call."""
    layout = choices.layout
    sizes = [f"{name}={size}" for name, size in _sizes(choices, 0).items()]
    if choices.plan is None:
        return [f"num_gpus_per_node={layout.gpus}", *sizes, "accelerator='cpu'"], []
    per_node = layout.node_gpus(choices.plan.request.gpu.per_node)
    arguments = [f"num_nodes={layout.gpus // per_node}", f"num_gpus_per_node={per_node}", *sizes]
    settings = [f"recipe.model.config.{name} = {value}" for name, value in _recomputed(choices).items()]
    return [*arguments, "accelerator='gpu'"], settings


def _of_bridge(choices: Choices) -> tuple[list[str], list[str]]:
    sizes = _sizes(choices, 1)
    if choices.layout.tp > 1:
        sizes |= {"sequence_parallel": "True", "expert_tensor_parallel_size": "1 if spec else None"}
    settings = {"seq_length": str(choices.seq_length)} | sizes | _recomputed(choices)
    return [f"{name}={value}" for name, value in settings.items()], []


def _sizes(choices: Choices, column: int) -> dict[str, str]:
    """Return setting -> value for the parallel sizes above 1; the dense baseline gets no expert parallelism.

    `column` selects the names in `_SIZES`.
    """
    sizes = {size: getattr(choices.layout, size) for size in _SIZES}
    return {
        _SIZES[size][column]: f"{value} if spec else 1" if size == "ep" else str(value)
        for size, value in sizes.items()
        if value > 1
    }


def _recomputed(choices: Choices) -> dict[str, str]:
    """Return Megatron's settings of recomputation, which are the same for both trainers."""
    values = recomputation(choices.plan.work) if choices.plan else {}
    return {name: f"{value!r} if spec else None" for name, value in values.items() if value is not None}


def _run_nemo(*_: Any) -> list[str]:
    return ["--factory", "recipe.chain"]


def _run_bridge(folder: Path, parent: FoundParent, choices: Choices) -> list[str]:
    values = {
        "dense": parent.address,
        "recipe": "recipe:pretrain",
        "dense_ct": "recipe:dense_ct",
        "gpus": choices.layout.gpus,
        "data": folder / BLEND,
        "evaluation": choices.suite,
        "dir": folder / run_name(parent, choices),
    }
    if choices.plan:
        values["gpus_per_node"] = choices.layout.node_gpus(choices.plan.request.gpu.per_node)
    return [f"{name}={value}" for name, value in values.items()]


#: trainer -> template of the recipe, function that returns its layout, and function that returns the command's words
_FORMS: dict[str, tuple[str, Callable[[Choices], tuple[list[str], list[str]]], Callable[..., list[str]]]] = {
    "nemo": (_NEMO, _of_nemo, _run_nemo),
    "bridge": (_BRIDGE, _of_bridge, _run_bridge),
}


def blend_text(texts: Texts, choices: Choices) -> str:
    """Return the text of the blend."""
    content: dict[str, Any] = {"sources": texts.sources, "seq_length": choices.seq_length}
    if held := choices.hold_out:
        content |= {"hold_out": {"validation": held.share, "heldout": held.share}, "seed": held.seed}
    told = "# The texts of this run, by `nemo-upcycle start`, to be edited; `hold_out` is not trained on.\n"
    return told + conf_text(content, width=120)


def differing_lines(folder: Path, files: Mapping[str, str]) -> dict[str, list[str]]:
    """Compare new files with the files in a folder, which the user may have edited.

    Args:
        folder: folder for the new files.
        files: name -> content.

    Returns:
        name -> lines of the folder's file (-) and of the new file (+), for each existing file that differs.
    """
    found = {}
    for name, text in files.items():
        path = folder / name
        if path.is_file() and (there := path.read_text(encoding="utf-8")) != text:
            lines = difflib.unified_diff(there.splitlines(), text.splitlines(), n=0, lineterm="")
            found[name] = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return found


def write_files(folder: Path, files: Mapping[str, str]) -> bool:
    """Write the files that a folder lacks.

    Args:
        folder: folder for the files.
        files: name -> content.

    Returns:
        Whether a file was written.
    """
    missing = [name for name in files if not (folder / name).is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    for name in missing:
        (folder / name).write_text(files[name], encoding="utf-8")
    return bool(missing)


def run_command(folder: Path, parent: FoundParent, choices: Choices, *, is_here: bool) -> CommandLine:
    """Return the command that runs a folder's files from the folder in which `nemo-upcycle start` runs.

    Args:
        folder: folder of the recipe; the folder is added to PYTHONPATH, so that the recipe can be imported.
        parent: dense model.
        choices: choices for the run.
        is_here: whether this machine has enough GPUs; if not, the command is a dry run for a cluster.
    """
    words = [shown_program("nemo"), "upcycle", "pipeline", *_FORMS[choices.trainer][2](folder, parent, choices)]
    words += ["--yes"] if is_here else [*CLUSTER, "--dryrun"]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return CommandLine(tuple(words), path)


def command_of_a_run(folder: Path) -> CommandLine | None:
    """Return the newest command that ran the files of a folder; None if there is none."""
    noted = sorted(folder.glob(f"*/{COMMAND}"), key=lambda path: path.stat().st_mtime)
    return CommandLine.read(noted[-1].read_text(encoding="utf-8")) if noted else None
