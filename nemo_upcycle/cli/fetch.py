"""`nemo-upcycle fetch`: put what a run takes from networks into one folder, for machines that have none."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from nemo_upcycle.cli.common import folder_to_make, require_overrides, show
from nemo_upcycle.data.fetched import Fetched, fill, find_damaged, read_fetched, variables_of
from nemo_upcycle.data.needs import FETCHED
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.progress import show_messages


EPILOG = f"""examples:
  nemo-upcycle fetch runs/fetched --for smollm2_135m_e8t2
  nemo-upcycle fetch /shared/fetched --for llama3_8b_e8t2
  nemo-upcycle fetch /shared/fetched dense=hf://ORG/NAME data=mine.yaml evaluation=paper
  nemo-upcycle fetch /shared/fetched data=fineweb_edu_academic_7_3 --for llama3_8b_e8t2
  nemo-upcycle fetch /shared/fetched --for runs/demo
  nemo-upcycle fetch /shared/fetched --check

The inputs are those of `nemo upcycle pipeline`, of NeMo and Megatron-Bridge alike. A run's are in its folder, as in
that of --render. Files of this machine are used where they lie, and not copied. DIR/{FETCHED} lists files and hashes.
Run it again to continue a stopped one, and to fetch again what is damaged; another recipe may go into the same DIR.
exit status: 0 all is there; 1 something is damaged, or could not be fetched; 2 a value or a file is wrong."""
_INPUTS = ("dense", "data", "evaluation")
_ELSEWHERE = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("output", metavar="DIR", type=folder_to_make, help="folder to fill")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help=f"{', '.join(_INPUTS)}: as the pipeline takes them",
    )
    parser.add_argument("--for", dest="run", metavar="RECIPE|RUN", help="whose inputs: a recipe, or a run's folder")
    parser.add_argument("--check", action="store_true", help="compare the files with their hashes, fetch nothing")


def run(args: argparse.Namespace) -> int:
    """Fill or check the folder, show what is in it, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    require_overrides(args)
    show_messages()
    folder = args.output.absolute()
    if args.check:
        if args.run is not None or args.overrides:
            expected = "DIR alone, all of which is checked"
            raise UpcycleError("--check", got="with what to fetch", expected=expected, fix="omit one of the two")
        if not (folder / FETCHED).is_file():
            fix = "name a folder that this command has filled"
            raise UpcycleError(str(folder), got=f"no {FETCHED}", expected="one", fix=fix)
        return _show(args, folder, read_fetched(folder))
    _keep_in(folder)
    from nemo_upcycle.data.network import run_needs

    return _show(args, folder, fill(folder, run_needs(*_inputs(args))))


def _inputs(args: argparse.Namespace) -> list[str]:
    """Return parent, data and evaluation of the run; empty ones are none."""
    given = dict(word.split("=", 1) for word in args.overrides)
    for name in given:
        if name not in _INPUTS:
            raise UpcycleError.unknown("argument", name, _INPUTS)
    known: dict[str, str] = {}
    if args.run and ("/" in args.run or Path(args.run).is_dir()):
        from nemo_upcycle.pipeline.order import kind_of, read_plan

        if kind_of(folder := Path(args.run)) is None:
            raise UpcycleError(
                "--for", got=f"{folder}, no run's folder", expected="a run's folder or a recipe", fix="check the path"
            )
        read = read_plan(folder).inputs
        known = dict(zip(_INPUTS, (read.dense, read.data, read.suite), strict=True))
    elif args.run:
        from nemo_upcycle.planning.hardware import known_recipe

        known = known_recipe(args.run).inputs
    inputs = known | given
    if not any(inputs.values()):
        raise UpcycleError(
            "what to fetch", got="nothing", expected="a recipe, a run or its inputs", fix="add --for RECIPE"
        )
    return [inputs.get(name, "") for name in _INPUTS]


def _keep_in(folder: Path) -> None:
    """Have this process keep there what it fetches, before a library of the hub is imported; not the user's token."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    os.environ.setdefault("HF_TOKEN_PATH", str(home / "token"))
    for name in _ELSEWHERE:
        os.environ.pop(name, None)
    os.environ.update(variables_of(folder))


def _show(args: argparse.Namespace, folder: Path, found: Fetched) -> int:
    damaged = find_damaged(folder, found.files)
    variables = variables_of(folder) | {"HF_HUB_OFFLINE": "1"}
    answer = {"folder": folder, **vars(found), "damaged": damaged, "variables": variables}
    lines = [f"{folder}: {len(found.files)} files, listed with their hashes in {FETCHED}"]
    lines += [f"  {what}, from {one['place']}; {one['license']}" for what, one in found.fetched.items()]
    lines += [f"  not fetched: {what}: {why}" for what, why in found.failed.items()]
    lines += [f"  damaged: {folder / name} is {how}; fetch again what it belongs to" for name, how in damaged.items()]
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    settings = ", ".join(f'{name}: "{value}"' for name, value in variables.items())
    lines += [f"Where there is no network:\n  export {exports}", f"  of an executor:  env_vars: {{{settings}}}"]
    show(args, answer, "\n".join(lines))
    return int(bool(found.failed or damaged))
