"""`nemo-upcycle evaluate`: score a checkpoint or a Hugging Face folder with lm-eval."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.cli.common import folder_to_make, show
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import packaged, packaged_names
from nemo_upcycle.utils.validation import check_whole


EPILOG = f"""examples:
  nemo-upcycle evaluate runs/demo demo results --data runs/demo/data/blend
  nemo-upcycle evaluate runs/demo/dense runs/demo/suite results --name dense
  torchrun --nproc-per-node 8 -m nemo_upcycle.cli evaluate runs/8b paper results --ep 8

A suite is a name, a YAML file, or a folder that was built earlier. The result, DIR/NAME.json, has the log-likelihoods
of every item. A checkpoint needs no export and can be evaluated under any layout. No tokens are dropped.
exit status: 0 done; 2 wrong value or file.

The package's own suites are in {packaged("evaluation")}; demo.yaml explains every key."""


_SIZES = ("tp", "pp", "ep")
#: Environment variables that a launcher sets for each rank.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint, a run, or a Hugging Face folder")
    parser.add_argument(
        "suite", metavar="SUITE", help=f"{', '.join(packaged_names('evaluation'))}, a YAML file, or a folder"
    )
    parser.add_argument("output", metavar="DIR", type=folder_to_make, help="folder for the result")
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="name of the model (default: dense for a dense Hugging Face folder, otherwise trained)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="blend or conversations whose held-out part is scored"
    )
    parser.add_argument(
        "--backend", metavar="hf|vllm|megatron|auto", help="engine that computes (default: from the suite)"
    )
    parser.add_argument(
        "--batch-size", type=_batch_size, metavar="N|auto", help="sequences per forward pass (default: from the suite)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N items of each task")
    parser.add_argument(
        "--strict", action="store_true", help="stop if the data of a task is unavailable (default: omit the task)"
    )
    group = parser.add_argument_group("a checkpoint")
    group.add_argument("--dense", type=Path, metavar="FOLDER", help="the parent (default: from the receipt)")
    for option, text in (("tp", "share every matrix"), ("pp", "share the layers"), ("ep", "share the experts")):
        group.add_argument(f"--{option}", type=int, default=1, metavar="N", help=f"ranks that {text} (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    from nemo_upcycle.data.suites.suite import load_suite_tasks
    from nemo_upcycle.data.suites.suite_config import BACKENDS, read_suite_config
    from nemo_upcycle.evaluation.backends import ModelOptions, choose_backend, open_model
    from nemo_upcycle.evaluation.run import evaluate
    from nemo_upcycle.utils.files import MARKER, read_json

    if args.backend is not None and args.backend not in BACKENDS:
        raise UpcycleError.unknown("--backend", args.backend, BACKENDS)
    _check_values(args)
    ranks = _ranks()
    args.name = args.name or _name_of(args.model)
    suite, is_built = Path(args.suite), (Path(args.suite) / MARKER).is_file()
    config = read_json(suite / MARKER)["config"] if is_built else vars(read_suite_config(args.suite))
    megatron: dict[str, Any] = {name: getattr(args, name) for name in _SIZES}
    megatron["dense"] = str(args.dense) if args.dense else None
    backend = args.backend or config["backend"]
    if ranks > 1 and (chosen := choose_backend(args.model, backend, config["dtype"])) != "megatron":
        raise UpcycleError(
            "torchrun",
            kind="refused",
            got=f"started {ranks} ranks, but {chosen} spreads {args.model} over all GPUs by itself",
            fix="start the command without torchrun",
        )
    if ranks > 1 and int(os.environ["RANK"]) > 0:  # this rank only serves the first rank, which reports errors
        try:
            open_model(
                args.model,
                backend=backend,
                dtype=config["dtype"],
                batch_size=args.batch_size or config["batch_size"],
                label=args.name,
                megatron=megatron,
            )
        except UpcycleError:
            return 2
        return 0
    if not is_built:
        suite = _build(args, config)
    tasks = load_suite_tasks(suite, strict=args.strict)
    result = evaluate(
        args.model,
        suite,
        args.output,
        name=args.name,
        limit=args.limit,
        tasks=tasks,
        options=ModelOptions(backend=backend, batch_size=args.batch_size, megatron=megatron),
    )
    rows = [(name, f"{one['value']:.4f}", one["stderr"]) for name, one in sorted(result["metrics"].items())]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:{width}}  {value}" + (f"  stderr {stderr:.4f}" if stderr else "") for name, value, stderr in rows]
    missing = result["missing"].items()
    lines += [f"{name}: not scored, because its data are not available ({reason})" for name, reason in missing]
    path = args.output / f"{args.name}.json"
    answer = {"output": path, **{key: result[key] for key in ("metrics", "missing", "model", "seconds")}}
    show(args, answer, "\n".join([f"{path}: {result['model']['class']}, {result['settings']['dtype']}", *lines]))
    return 0


def _check_values(args: argparse.Namespace) -> None:
    """Check the numbers and the name, and refuse a layout for a Hugging Face folder.

    Raises:
        UpcycleError: a value is wrong.
    """
    if args.limit is not None:
        check_whole("limit", args.limit, 1)
    for size in _SIZES:
        check_whole(size, getattr(args, size), 1)
    if args.name and (Path(args.name).name != args.name or args.name.startswith(".") or not args.name.isprintable()):
        fix = "give the folder as DIR, and only the model's name as --name"
        expected = "the name of a file, without folders"
        raise UpcycleError("--name", got=repr(args.name), expected=expected, fix=fix)
    named = [f"--{size} {value}" for size in _SIZES if (value := getattr(args, size)) != 1]
    named += ["--dense"] if args.dense else []
    if named and (args.model / "config.json").is_file():
        raise UpcycleError(
            named[0],
            kind="refused",
            got=(
                f"applies to Megatron checkpoints; {args.model} is a Hugging Face folder, which is spread over all "
                "GPUs by itself"
            ),
            fix=f"omit {' and '.join(named)}",
        )


def _ranks() -> int:
    """Return the number of ranks that torchrun or another launcher started.

    Raises:
        UpcycleError: only some of the launcher's variables are set, so another program has set them in this shell.
    """
    there = [name for name in _RANK_VARIABLES if os.environ.get(name)]
    ranks, number = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
    is_launched = len(there) == len(_RANK_VARIABLES) and ranks.isdecimal() and number.isdecimal()
    if is_launched or ("RANK" not in there and ranks in ("", "1")):
        return int(ranks or 1)
    left_over = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    raise UpcycleError(
        " and ".join(f"{name}={os.environ[name]}" for name in left_over),
        kind="state",
        got=f"is set in this shell, but no launcher set all of {', '.join(_RANK_VARIABLES)}",
        fix=f"type `unset {' '.join(left_over)}` first, or start the ranks with torchrun",
    )


def _name_of(model: Path) -> str:
    """Return the default name of a model: `dense` for a Hugging Face folder without experts, otherwise `trained`."""
    from nemo_upcycle.models.hf_config import read_architecture

    try:
        return "trained" if read_architecture(model).num_experts else "dense"
    except UpcycleError:  # a checkpoint, or an unknown model class
        return "trained"


def _build(args: argparse.Namespace, config: Mapping[str, Any]) -> Path:
    """Build a suite in the folder of the results."""
    from nemo_upcycle.data.chat.finished import open_data
    from nemo_upcycle.data.suites.local_tasks import is_answers, is_text
    from nemo_upcycle.data.suites.suite import build_named_suite

    tasks = config["tasks"] if config["local"] else ()
    texts = [task for task in tasks if is_text(task) or is_answers(task)]
    if texts and args.data is None:
        raise UpcycleError(
            f"{', '.join(texts)}",
            kind="missing",
            got="needs held-out documents or answers",
            fix="add --data FOLDER, as made by `nemo-upcycle data`, `nemo-upcycle chat` or a run's data stage",
        )
    held_out = open_data(args.data).held_out if args.data else {"heldout_documents": []}
    return build_named_suite(args.suite, output=args.output / "suite", **held_out)


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UpcycleError("--batch-size", got=text, expected="a whole number, 1 or more, or auto", fix="write auto")
    return int(text)
