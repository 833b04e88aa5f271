"""`nemo-upcycle data DIR --find VALUE`: the documents, samples and steps of a run that contain a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.cli.common import show
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.trainers.lineage import ranges_text, skipped_samples
from nemo_upcycle.trainers.settings import SEQUENCE
from nemo_upcycle.trainers.stop_error import rewind_command


if TYPE_CHECKING:
    from nemo_upcycle.data.find import Documents, Read, Reading
    from nemo_upcycle.data.finished import FinishedBlend

#: Documents, ranges of samples or steps of a document, and characters of the value, that the text shows; JSON has all.
_SHOWN_DOCUMENTS, _SHOWN_RANGES, _SHOWN_CHARACTERS = 20, 8, 60


def find(args: argparse.Namespace) -> int:
    """Find documents, show where the run reads them, and return the exit status: 1 if there are none.

    Raises:
        UpcycleError: the folder is neither a run nor a finished data folder, or options contradict each other.
    """
    _require_alone(args)
    folder = Path(args.blend).expanduser()
    run_dir = folder if (folder / "pipeline.json").is_file() else None
    if not folder.is_dir():
        raise UpcycleError.no_path("folder of a run or of data", folder)
    if find_spec("megatron") is None:
        raise UpcycleError(
            "Megatron-Core",
            kind="missing",
            got="is not installed, and the order of samples is computed with it",
            fix="run the command in the environment of NeMo or Megatron-Bridge",
        )
    blend = _blend_of(folder, run_dir)
    from nemo_upcycle.data.find import count_documents, find_documents

    found = list(find_documents(blend, args.find))
    answer = {"data": str(blend.folder), "find": args.find}
    if not found:
        where = f"the {count_documents(blend):,} training documents of {blend.folder}"
        text = f"Not found in {where}: {_quoted(args.find)}"
        show(args, answer | {"documents": [], "samples": [], "steps": [], "skip_steps": "", "rewind": []}, text)
        return 1
    reading, why_none = _reading(blend, run_dir)
    read = _samples(blend, found, reading) if reading else []
    run = reading if run_dir else None
    rows, steps = _rows(found, read, run), _joined([one.steps for one in read]) if run else []
    skip = ranges_text(steps)
    rewinds = list(_rewinds(folder, steps[0][0], skip)) if steps else []
    count = sum(one.last - one.first + 1 for one in found)
    lines = [f"{blend.folder}: {count:,} training document{'s' * (count > 1)} with {_quoted(args.find)}"]
    lines += [_row_text(row) for row in rows[:_SHOWN_DOCUMENTS]]
    if len(rows) > _SHOWN_DOCUMENTS:
        lines.append(f"  and {len(rows) - _SHOWN_DOCUMENTS:,} more; --json lists all")
    if steps:
        lines += [f"Steps: {ranges_text(steps, ', ')}", f"--skip-steps {skip}"]
        lines += [f"To train again without them: `{command}`" for command in rewinds]
    elif run:
        lines.append(f"The run reads none of them in its {run.samples // run.batch:,} steps.")
    else:
        lines.append(why_none or "These are the samples of a run that reads as many tokens as the data have.")
    samples = _joined([one.samples for one in read])
    answer |= {"documents": rows, "samples": samples, "steps": steps, "skip_steps": skip, "rewind": rewinds}
    show(args, answer, "\n".join(lines))
    return 0


def _require_alone(args: argparse.Namespace) -> None:
    """Refuse everything that only a build uses."""
    options = [f"--{name}" for name in ("workers", "slurm", "time", "ray", "strict", "update", "check")]
    given = [option for option in options if getattr(args, option[2:]) not in (None, False)]
    given += [str(word) for word in (args.output, *args.overrides) if word is not None]
    if given:
        fix = f"omit {given[0]}: the command reads only the folder of a run, or a finished data folder"
        raise UpcycleError("--find", kind="refused", got=f"cannot be combined with {given[0]}", fix=fix)


def _blend_of(folder: Path, run_dir: Path | None) -> FinishedBlend:
    from nemo_upcycle.data.chat.config import is_chat
    from nemo_upcycle.data.finished import MANIFEST, open_blend
    from nemo_upcycle.reporting.run_folder import data_folder, read_markers

    data = data_folder(run_dir, read_markers(run_dir)) if run_dir else folder
    if not run_dir and not (folder / MANIFEST).is_file():
        raise UpcycleError(
            str(folder),
            kind="state",
            got=f"is neither the folder of a run (no pipeline.json) nor finished data (no {MANIFEST})",
            fix="name the folder of a run, or a finished folder of `nemo-upcycle data`",
        )
    if is_chat(str(data)):
        raise UpcycleError(
            "--find",
            kind="refused",
            got=f"searches texts, and {data} has conversations",
            fix="name a run that trains on texts",
        )
    return open_blend(data)


def _reading(blend: FinishedBlend, run_dir: Path | None) -> tuple[Reading | None, str]:
    """Return how a run reads its data, or how a run would read a data folder once; or why samples are unknown."""
    from nemo_upcycle.data.find import Reading
    from nemo_upcycle.data.skipped_samples import SkippedSamples
    from nemo_upcycle.reporting.run_folder import read_settings

    if run_dir is None:
        if not (seq_length := blend.manifest["seq_length"]):
            return None, "The samples are unknown, because the manifest has no seq_length."
        try:
            blend.require_length(seq_length)
        except UpcycleError as error:
            return None, f"The samples are unknown. {error}"
        samples = blend.manifest["splits"]["train"]["tokens"] // seq_length
        return Reading(seq_length, blend.manifest["seed"], samples), ""
    settings, given = read_settings(run_dir, "pretrain"), _given(run_dir)
    batch = settings["global_batch_size"]
    _warn_if_changed(blend)
    before = given.get("skip_samples", 0)
    left_out = ((start + before, end + before) for start, end in skipped_samples(run_dir / "pretrain").ranges)
    return Reading(
        settings["seq_length"],
        given.get("seed", blend.manifest["seed"]),
        settings["max_steps"] * batch,
        batch,
        SkippedSamples.of([(0, before), *left_out]),
    ), ""


def _given(run_dir: Path) -> dict[str, int]:
    """Return `seed` and `skip_samples` of a run's data, if they are set.

    A seed that a Megatron-Bridge recipe sets in its own code is unknown here; an override is known.
    """
    from nemo_upcycle.pipeline.stages import RunPlan

    plan = RunPlan.read(run_dir)
    settings = plan.training_settings("pretrain").fixed
    node = SEQUENCE.of(plan.trainer).rpartition(".")[0]  # the part of a recipe with the settings of the data
    texts = {name: settings.get(f"{node}.{name}", "") for name in ("seed", "skip_samples")}
    return {name: int(text) for name, text in texts.items() if text.isdecimal()}


def _warn_if_changed(blend: FinishedBlend) -> None:
    """Warn if the manifest changed after a training built its order of samples."""
    from nemo_upcycle.data.blend_samples import INDICES
    from nemo_upcycle.data.finished import MANIFEST
    from nemo_upcycle.utils.files import MARKER, is_complete, read_json, sha256_file

    cache, manifest = blend.folder / INDICES, blend.folder / MANIFEST
    if is_complete(cache) and read_json(cache / MARKER)["manifest"] != sha256_file(manifest):
        sys.stderr.write(
            f"warning: {manifest} changed after the training began. If a weight changed, the samples and steps are "
            "wrong: restore the manifest.\n"
        )


def _samples(blend: FinishedBlend, found: Sequence[Documents], reading: Reading) -> list[Read]:
    import warnings

    from nemo_upcycle.data.find import find_samples
    from nemo_upcycle.utils.console import is_verbose, quiet_libraries

    with warnings.catch_warnings():
        if not is_verbose():
            quiet_libraries()
        return find_samples(blend, found, reading)


def _rewinds(run_dir: Path, first_step: int, skip: str) -> Iterator[str]:
    """Yield the command that rewinds each training which has a checkpoint before a step."""
    for name in ("pretrain", "dense_ct"):
        if command := rewind_command(run_dir / name, first_step, f"--skip-steps {skip}"):
            yield command


def _rows(found: Sequence[Documents], read: Sequence[Read], run: Reading | None) -> list[dict[str, Any]]:
    """Return documents, samples and steps for JSON; `run` is None for a data folder, which has no steps."""
    from nemo_upcycle.data.find import ranges_of

    rows: list[dict[str, Any]] = [asdict(one) for one in found]
    for row, one in zip(rows, read, strict=False):  # `read` is empty if the samples are unknown
        row["samples"] = ranges_of(one.samples)
        if run:
            row["steps"] = ranges_of(one.steps)
    return rows


def _joined(numbers: Sequence[Any]) -> list[tuple[int, int]]:
    """Return the ranges of several arrays of numbers together."""
    import numpy as np

    from nemo_upcycle.data.find import ranges_of

    return ranges_of(np.unique(np.concatenate(numbers))) if numbers else []


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")


def _row_text(row: dict[str, Any]) -> str:
    numbers = ranges_text([(row["first"], row["last"])])
    parts = [f"{row['tokens']:,} tokens"]
    for name in ("samples", "steps"):
        if name in row:
            shown, more = row[name][:_SHOWN_RANGES], ", ..." if len(row[name]) > _SHOWN_RANGES else ""
            parts.append(f"{name} {ranges_text(shown, ', ')}{more}" if shown else f"no {name}")
    return f"  {row['source']}:{numbers}: {'; '.join(parts)}"
