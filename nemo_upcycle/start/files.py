"""The recipe and the blend of a run, as files that are meant to be edited, and the command that runs them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.data.blend import ONLY
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.start.choices import Choices
from nemo_upcycle.start.parent import Parent
from nemo_upcycle.start.texts import Texts
from nemo_upcycle.trainers.commands import recomputation


#: In the folder that is named: the files, and the run.
RECIPE, BLEND, RUN = "recipe.py", "blend.yaml", "run"
_NEMO = '''"""{title}, upcycled to {experts}; by `nemo-upcycle start`, to be edited."""

from pathlib import Path

import nemo_run as run

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.recipes import pipeline, upcycled_from

HERE = Path(__file__).resolve().parent
DENSE = {dense!r}
SPEC = UpcycleSpec({spec})


def training(spec):
    """Make the training of the upcycled model, or with spec=None of the dense baseline."""
    recipe = upcycled_from(
        DENSE,
        spec=spec,
        seq_length={seq_length},
        global_batch_size={global_batch},
        micro_batch_size={micro_batch},
        max_steps={steps},
        lr={peak:g},
        min_lr={end:g},
        warmup_steps={warmup},{layout}
    ){settings}
    return recipe


@run.cli.factory(target=pipeline)
def chain() -> run.Partial:
    """Make the chain: import, data, upcycle, pretrain, dense_ct, export, evaluate, report."""
    return run.Partial(
        pipeline,
        dir=str(HERE / "{run}"),
        dense=DENSE,
        data=str(HERE / "{blend}"),
        evaluation="{suite}",
        pretrain=training(SPEC),
        dense_ct=training(None),
    )
'''
_BRIDGE = '''"""{title}, upcycled to {experts}; by `nemo-upcycle start`, to be edited."""

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.trainers.bridge.recipes.common import upcycled_pretraining

DENSE = {dense!r}
SPEC = UpcycleSpec({spec})


def pretrain(spec=SPEC):
    """Make the training of the upcycled model, or with spec=None of the dense baseline."""
    config = upcycled_pretraining(
        DENSE,
        spec,
        seq_length={seq_length},{layout}
    )
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = {steps}, {global_batch}, {micro_batch}
    config.optimizer.lr, config.optimizer.min_lr, config.scheduler.lr_warmup_iters = {peak:g}, {end:g}, {warmup}
    config.validation.eval_interval, config.validation.eval_iters = {validate_every}, {validations}
    config.checkpoint.save_interval = {save_every}{settings}
    return config


def dense_ct():
    """Make the training of the dense baseline."""
    return pretrain(None)
'''
#: Size of a layout -> argument of `upcycled_from`, and Megatron's setting.
_SIZES = {
    "tp": ("tensor_parallelism", "tensor_model_parallel_size"),
    "pp": ("pipeline_parallelism", "pipeline_model_parallel_size"),
    "cp": ("context_parallelism", "context_parallel_size"),
    "ep": ("expert_parallelism", "expert_model_parallel_size"),
}


def recipe_text(parent: Parent, choices: Choices) -> str:
    """Write the recipe for the trainer that was chosen."""
    every = max(1, choices.steps // 2)
    values: dict[str, Any] = {
        "title": parent.address.rstrip("/").rpartition("/")[2],
        "experts": f"{choices.spec.num_experts} experts, top-{choices.spec.top_k}",
        "dense": parent.address,
        "spec": ", ".join(f"{name}={value!r}" for name, value in choices.spec_fields.items()),
        "micro_batch": choices.plan.layout.micro_batch if choices.plan else 1,
        "validate_every": every if choices.plan is None else min(every, 500),
        "validations": 1 if choices.plan is None else 8,
        "save_every": choices.steps if choices.plan is None else min(choices.steps, 1000),
        "run": RUN,
        "blend": BLEND,
    }
    values |= {name: getattr(choices, name) for name in ("seq_length", "global_batch", "steps", "peak", "end", "warmup")}
    form, arguments, settings = {"nemo": (_NEMO, *_of_nemo(choices)), "bridge": (_BRIDGE, *_of_bridge(choices))}[
        choices.trainer
    ]
    lines = "".join(f"\n        {argument}," for argument in arguments)
    more = "".join(f"\n    {setting}" for setting in settings)
    return form.format(**values, suite=choices.suite, layout=lines, settings=more)


def _of_nemo(choices: Choices) -> tuple[list[str], list[str]]:
    """Return the arguments of the layout, and lines behind."""
    if choices.plan is None:
        return [], []
    layout = choices.plan.layout
    per_node = layout.node_gpus(choices.plan.request.gpu.per_node)
    arguments = [f"num_nodes={layout.gpus // per_node}", f"num_gpus_per_node={per_node}"]
    for size, (name, _) in _SIZES.items():
        if (value := getattr(layout, size)) > 1:
            arguments.append(f"{name}={f'{value} if spec else 1' if size == 'ep' else value}")
    return arguments, [f"recipe.model.config.{name} = {value!r}" for name, value in _recomputed(choices).items()]


def _of_bridge(choices: Choices) -> tuple[list[str], list[str]]:
    if choices.plan is None:
        return [], ["config.checkpoint.most_recent_k = 1"]
    layout, arguments = choices.plan.layout, []
    for size, (_, name) in _SIZES.items():
        if (value := getattr(layout, size)) > 1:
            arguments.append(f"{name}={f'{value} if spec else 1' if size == 'ep' else value}")
    arguments += ["sequence_parallel=True"] if layout.tp > 1 else []
    arguments += ["expert_tensor_parallel_size=1 if spec else None"] if layout.tp > 1 else []
    return [*arguments, *(f"{name}={value!r}" for name, value in _recomputed(choices).items())], []


def _recomputed(choices: Choices) -> Mapping[str, Any]:
    """Return what is recomputed, in Megatron's settings, which are both trainers'."""
    values = recomputation(choices.plan.work) if choices.plan else {}
    return {name: value for name, value in values.items() if value is not None}


def blend_text(texts: Texts, choices: Choices) -> str:
    """Write the blend."""
    content: dict[str, Any] = {"sources": {ONLY: texts.source}, "seq_length": choices.seq_length}
    if held := choices.hold_out:
        content |= {"hold_out": {"validation": held.share, "heldout": held.share}, "seed": held.seed}
    told = "# The texts of this run, by `nemo-upcycle start`, to be edited; `hold_out` is not trained on.\n"
    return told + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def write_files(folder: Path, files: Mapping[str, str], go_on: Callable[[], str]) -> bool:
    """Write files that are not there; leave equal ones.

    Args:
        folder: where they go.
        files: name -> content.
        go_on: gives the command that goes on with what is there.

    Returns:
        Whether anything was written.

    Raises:
        UpcycleError: one is there and differs: it may have been edited.
    """
    there = {name: (folder / name).read_text(encoding="utf-8") for name in files if (folder / name).is_file()}
    if differing := [name for name, text in there.items() if text != files[name]]:
        fix = f"go on with what is there: {go_on()}; or give another --dir, or delete {' and '.join(differing)}"
        raise UpcycleError(
            f"--dir {folder}", got=f"{' and '.join(differing)} with other content", expected="none, or the same", fix=fix
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in files.keys() - there.keys():
        (folder / name).write_text(files[name], encoding="utf-8")
    return len(there) < len(files)


def run_words(folder: Path, parent: Parent, choices: Choices) -> list[str]:
    """Return the words of the command that runs the files of a folder, whose recipe is found by PYTHONPATH."""
    if choices.trainer == "nemo":
        return ["nemo", "upcycle", "pipeline", "--factory", "recipe.chain", "--yes"]
    values = {
        "dense": parent.address,
        "recipe": "recipe:pretrain",
        "dense_ct": "recipe:dense_ct",
        "gpus": max(1, choices.gpus),
        "data": folder / BLEND,
        "evaluation": choices.suite,
        "dir": folder / RUN,
    }
    if choices.plan:
        values["gpus_per_node"] = choices.plan.layout.node_gpus(choices.plan.request.gpu.per_node)
    return ["nemo", "upcycle", "pipeline", *(f"{name}={value}" for name, value in values.items()), "--yes"]


def run_command(folder: Path, parent: Parent, choices: Choices) -> str:
    """Return the command as it is typed where `nemo-upcycle start` was."""
    words = [program(shown=True), *run_words(folder, parent, choices)[1:]]
    return f"PYTHONPATH={shlex.quote(str(folder))} {shlex.join(words)}"


def program(*, shown: bool = False) -> str:
    """Return this environment's `nemo`; to be shown, its name alone where a shell finds that one."""
    own = Path(sys.executable).with_name("nemo")
    found = shutil.which("nemo")
    is_found = found is not None and Path(found).absolute() == own.absolute()
    if shown and is_found:
        return "nemo"
    return os.path.relpath(own) if shown and own.is_relative_to(Path.cwd()) else str(own)
