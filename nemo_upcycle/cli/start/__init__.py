"""`nemo-upcycle start`: write a recipe, a blend and a forecast for a model and texts; with --yes train the MoE."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from nemo_upcycle.cli.common import add_spec_options, folder_to_make, show, used_spec
from nemo_upcycle.cli.start.choices import (
    Choices,
    Wanted,
    choose,
    choose_trainer,
    gpus_here,
    shortages,
    writable_part,
)
from nemo_upcycle.cli.start.files import (
    BLEND,
    RECIPE,
    blend_text,
    command_of_a_run,
    differing_lines,
    recipe_text,
    run_command,
    write_files,
)
from nemo_upcycle.cli.start.parent import inspect_parent
from nemo_upcycle.cli.start.texts import find_texts
from nemo_upcycle.data.readers import readable
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.planning.hardware import gpu_names
from nemo_upcycle.planning.layout import CPU_RANKS
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.utils.command_line import CommandLine, own_program
from nemo_upcycle.utils.console import in_columns, short_count
from nemo_upcycle.utils.validation import check_number, check_whole


EPILOG = """examples:
  nemo-upcycle start asset://smollm2-135m         the demo's model and texts
  nemo-upcycle start /models/mine /texts
  nemo-upcycle start Qwen/Qwen3-0.6B '/texts/*.jsonl.gz' --experts 16 --dir runs/mine --yes
  nemo-upcycle start /models/Llama-3-8B /texts --gpus 64 --gpu h100

It writes recipe.py and blend.yaml. Edit them freely; existing files are never overwritten. The printed command runs:
import, data, check of step 0, training, dense baseline, export, evaluation on held-out texts of yours, report.
exit status: 0 files written (with --yes: run finished); 1 the run did not finish; 2 something is missing."""
_T = TypeVar("_T")
#: Upper limit for the number of GPUs; no cluster has more.
_MOST_GPUS = 100_000
#: Largest number of lines to show for a file that differs.
_SHOWN_LINES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", help="dense: a Hugging Face folder, or ORG/NAME on the hub")
    text = f"a file, a folder, or a pattern in quotes ({readable()}); omitted: the demo's"
    parser.add_argument("texts", metavar="TEXTS", nargs="?", help=text)
    how = parser.add_argument_group("how to train")
    how.add_argument(
        "--gpus", type=int, metavar="N", help="number of GPUs (default: all of this machine; 0: a trial on its CPU)"
    )
    how.add_argument("--gpu", metavar="NAME", help=f"kind of GPU: {', '.join(gpu_names())} (default: h100)")
    how.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="training steps (default: 10 on a CPU; on GPUs, enough to read the texts once)",
    )
    text = "number of times to read the texts, in place of --steps; required above 100"
    how.add_argument("--epochs", type=float, metavar="N", help=text)
    how.add_argument(
        "--dir", type=folder_to_make, metavar="DIR", help="folder for the files and the run (default: runs/MODEL)"
    )
    how.add_argument("--yes", action="store_true", help="run the chain at once")
    add_spec_options(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files of a run and show them; with --yes run the chain.

    Returns:
        The exit status.

    Raises:
        UpcycleError: something is missing; the text lists everything that is missing.
    """
    for name, low, high in (("gpus", 0, _MOST_GPUS), ("steps", 1, math.inf)):
        if (value := getattr(args, name)) is not None:
            check_whole(name, value, low, high)
    if args.epochs is not None:
        check_number("epochs", args.epochs, 1e-6)
        if args.steps is not None:
            raise UpcycleError(
                "--epochs", kind="refused", got="cannot be combined with --steps", fix="omit one of them"
            )
    problems: list[UpcycleError] = []

    def tried(find: Callable[..., _T], *given: Any) -> _T | None:
        try:
            return find(*given)
        except UpcycleError as error:
            problems.append(error)
            return None

    parent = tried(inspect_parent, args.model)
    texts = tried(find_texts, args.texts, parent.tokenizer if parent else None)
    trainer = tried(choose_trainer)
    problems += _missing_packages()
    choices: Choices | None = None
    if parent and texts:
        wanted = Wanted(used_spec(args), args.gpus, args.gpu, args.steps, args.epochs)
        choices = tried(choose, parent, texts, trainer or "nemo", wanted)
    if choices and args.texts is None and choices.gpus > CPU_RANKS:
        problems.append(
            UpcycleError(
                "TEXTS",
                kind="missing",
                got=f"are missing, and the demo's texts are too few for {choices.gpus:,} GPUs",
                fix="name your texts",
            )
        )
    folder = args.dir or Path("runs") / (parent.name if parent else "")
    existing = tried(writable_part, folder)
    if choices and existing and not args.gpus:  # with --gpus the run may be for a cluster
        problems += shortages(choices, folder)
    if problems or not (parent and texts and choices):
        raise UpcycleError.together(problems)
    gpus, _ = gpus_here()
    is_here = choices.gpus <= gpus
    command = run_command(folder, parent, choices, is_here=is_here)
    files = {RECIPE: recipe_text(parent, choices), BLEND: blend_text(texts, choices)}
    differing = differing_lines(folder, files)
    is_new = not differing and write_files(folder, files)
    found, forecast = {"model": parent.description, **texts.described}, _forecast(choices)
    chosen = {name: {"value": value, "because": why} for name, value, why in choices.rows}
    paths = [str(folder / name) for name in files]
    answer: dict[str, Any] = found | {"choices": chosen, "forecast": forecast, "files": paths}
    answer |= {"differing": differing} if differing else {"command": str(command)}
    lines = [*in_columns([*found.items()]), "", *in_columns(choices.rows), "", *in_columns([*forecast.items()])]
    if differing:
        lines += ["", *_differences(folder, differing)]
    else:
        verb = "written" if is_new else "already there, unchanged"
        lines += ["", f"{verb}: {', '.join(paths)}", "", f"{'run it' if is_here else 'check it'}:  {command}"]
    if not differing and not is_here:
        lines += [f"This machine has {gpus} GPU{'s' * (gpus != 1)}: replace ACCOUNT, PARTITION and IMAGE (null"]
        lines += ["without containers) by your cluster's. The same command with --yes, not --dryrun, submits the run."]
    show(args, answer, "\n".join(lines))
    sys.stdout.flush()
    if differing:
        own = run_command(folder, parent, choices, is_here=True).changed({}, "--dryrun")
        there = command_of_a_run(folder) or own
        raise _other_files(folder, differing, there)
    if not args.yes:
        return 0
    if not is_here:
        raise UpcycleError(
            "--yes",
            kind="refused",
            got=f"needs {choices.gpus} GPUs, and this machine has {gpus}",
            fix=f"type `{command}`",
        )
    command = run_command(folder.absolute(), parent, choices, is_here=True)
    words = [str(own_program("nemo")), *command.words[1:]]
    variables = os.environ | {"PYTHONPATH": command.python_path}
    os.execve(words[0], words, variables)  # the chain replaces this process, so it receives all signals


def _differences(folder: Path, differing: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the first differing lines: from the folder's files (-) and from this command's files (+)."""
    for name, lines in differing.items():
        more = [f"... {len(lines) - _SHOWN_LINES} lines more"] if len(lines) > _SHOWN_LINES else []
        yield from (f"{folder / name} differs (-: existing line, +: new line)", *lines[:_SHOWN_LINES], *more)


def _other_files(folder: Path, differing: Iterable[str], there: CommandLine) -> UpcycleError:
    """Return the error for a folder with edited files or another start's files; `there` is the files' command."""
    names = " and ".join(differing)
    return UpcycleError(
        f"--dir {folder}",
        kind="state",
        got=f"has {names} with other content",
        fix=f"give another --dir, delete {names}, or continue with the existing files: `{there}`",
    )


def _missing_packages() -> list[UpcycleError]:
    """Return an error for each missing package that the chain needs in addition to the trainer."""
    fix = "run `nemo-upcycle doctor`: it prints the command that adds it"
    return [
        UpcycleError(
            f"Package {name}", kind="missing", got="is not installed", expected=f"it is needed for {why}", fix=fix
        )
        for name, why in (("nemo_run", "the chain"), ("lm_eval", "its evaluation"))
        if find_spec(name) is None
    ]


def _forecast(choices: Choices) -> dict[str, str]:
    """Forecast the size, memory, time and disk space of a run."""
    arch, plan = choices.arch, choices.plan
    rows = {"size": f"{short_count(arch.total_params)} parameters, {short_count(arch.active_params)} active"}
    if plan:
        gib = plan.request.gpu.memory_gib
        rows["memory"] = f"{plan.memory.total / GIB:.0f} of {gib:g} GiB a GPU: {plan.verdict}"
        took = f"{plan.hours:,.1f} h" if plan.hours >= 1 else f"{60 * plan.hours:.0f} min"
        rows["time"] = f"{took}, {plan.gpu_hours:,.1f} GPU-hours; the baseline takes less"
    else:
        rows["memory"] = f"about {choices.needed_memory_bytes / GIB:.1f} GiB of this machine"
    return rows | {"disk": f"about {choices.needed_disk_bytes / GIB:.1f} GiB"}
