"""`nemo-upcycle fetch`: download everything that a run needs into one folder, for machines without a network."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from nemo_upcycle.cli.common import folder_to_make, require_overrides, show
from nemo_upcycle.data.needs import note_fetched
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import CACHE_VARIABLE
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.progress import show_messages


EPILOG = """examples:
  nemo-upcycle fetch runs/fetched --for smollm2_135m_e8t2
  nemo-upcycle fetch /shared/fetched --for llama3_8b_e8t2
  nemo-upcycle fetch /shared/fetched dense=hf://ORG/NAME data=mine.yaml evaluation=paper
  nemo-upcycle fetch /shared/fetched data=fineweb_edu_academic_7_3 --for llama3_8b_e8t2
  nemo-upcycle fetch /shared/fetched --for runs/demo

Name the inputs as for `nemo upcycle pipeline`, or give the folder of a run or of --render. Files on this machine are
not copied. Models and data sets from the hub go into the hub's own cache format below DIR. Run the same command again
to continue. Several recipes can share one DIR.
exit status: 0 everything is fetched; 1 something could not be fetched; 2 wrong value or file."""
_INPUTS = ("dense", "data", "evaluation")
#: Variables that take precedence over HF_HOME when the hub's cache is chosen.
_ELSEWHERE = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("output", metavar="DIR", type=folder_to_make, help="folder to fill")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help=f"{', '.join(_INPUTS)}: inputs, named as for the pipeline",
    )
    parser.add_argument(
        "--for", dest="run", metavar="RECIPE|RUN", help="fetch the inputs of a recipe or of a run's folder"
    )


def run(args: argparse.Namespace) -> int:
    """Fill the folder, show its content, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    require_overrides(args)
    inputs = _inputs(args)
    messages = show_messages()
    folder = args.output.absolute()
    variables = {CACHE_VARIABLE: str(folder), "HF_HOME": str(folder / "hf")}
    _use_caches(variables)
    from nemo_upcycle.pipeline.inputs import Inputs
    from nemo_upcycle.pipeline.needs import run_needs

    fetched, failed = dict[str, str](), dict[str, str]()
    needs = run_needs(Inputs(*inputs))
    for number, need in enumerate(needs, 1):
        size = f", {size_text(need.size_bytes)}" if need.size_bytes else ""
        messages.info("[%d of %d] %s, from %s%s", number, len(needs), need.what, need.place, size)
        try:
            need.fetch()
        except UpcycleError as error:
            failed[need.what] = str(error)
        else:
            fetched[need.what] = need.place
    note_fetched(folder, fetched)
    variables["HF_HUB_OFFLINE"] = "1"
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    settings = ", ".join(f'{name}: "{value}"' for name, value in variables.items())
    lines = [
        f"{folder}:",
        *(f"  {what}, from {place}" for what, place in fetched.items()),
        *(f"  not fetched: {what} ({why})" for what, why in failed.items()),
        f"On a machine without network:\n  export {exports}\n  in an executor:  env_vars: {{{settings}}}",
    ]
    answer = {"folder": folder, "fetched": fetched, "failed": failed, "variables": variables}
    show(args, answer, "\n".join(lines))
    return int(bool(failed))


def _inputs(args: argparse.Namespace) -> list[str]:
    """Return parent, data and evaluation of the run; "" for an input that is not given."""
    given = dict(word.split("=", 1) for word in args.overrides)
    for name in given:
        if name not in _INPUTS:
            raise UpcycleError.unknown("argument", name, _INPUTS)
    known: dict[str, str] = {}
    if args.run and ("/" in args.run or Path(args.run).is_dir()):
        from nemo_upcycle.pipeline.order import kind_of, read_plan

        if kind_of(folder := Path(args.run)) is None:
            raise UpcycleError(
                "--for",
                kind="state",
                got=f"{folder} is neither the folder of a run nor a recipe",
                fix="check the path",
            )
        read = read_plan(folder).inputs
        known = dict(zip(_INPUTS, (read.dense, read.data, read.suite), strict=True))
    elif args.run:
        from nemo_upcycle.recipes import known_recipe

        known = known_recipe(args.run).inputs
    inputs = known | given
    if not any(inputs.values()):
        raise UpcycleError("Nothing to fetch was named. Add --for RECIPE.")
    return [inputs.get(name, "") for name in _INPUTS]


def _use_caches(variables: dict[str, str]) -> None:
    """Set the caches of this process; the user's token stays in its file.

    Call this function before any library of the hub is imported.
    """
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    os.environ.setdefault("HF_TOKEN_PATH", str(home / "token"))
    for name in _ELSEWHERE:
        os.environ.pop(name, None)
    os.environ.update(variables)
