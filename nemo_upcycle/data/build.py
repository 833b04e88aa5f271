"""Build a blend: check, plan the tasks, let the data engine clean and tokenise, merge, and write the manifest.

The finished folder holds:

    tokens/SOURCE_SPLIT_NN_text_document.{bin,idx}   training and validation tokens (Megatron's indexed datasets)
    heldout.jsonl         texts for perplexity
    tokenizer/            with the padding token that training needs
    contamination.json    which evaluation items were found, and where
    manifest.json         sources, licences, counts of every step, versions
    build/                removed documents with the reason, and the engine's logs
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import SPLITS, Blend, BlendConfig, SourceConfig, read_blend
from nemo_upcycle.data.contamination import build_index, check_suites
from nemo_upcycle.data.engine.lines import is_address
from nemo_upcycle.data.engine.tasks import BEGUN
from nemo_upcycle.data.environment import data_python, engine_version, run_engine
from nemo_upcycle.data.finished import BUILD, FORMAT, MANIFEST, TOKENIZER
from nemo_upcycle.data.first_look import check_texts
from nemo_upcycle.data.inputs import (
    NGRAMS,
    InputFile,
    check_files,
    list_inputs,
    make_plan,
    reader_of,
    require_disjoint,
)
from nemo_upcycle.data.losses import size_check
from nemo_upcycle.data.made_from import Stamp, cached_folder, compare, named_tokenizer, require_same, stamps
from nemo_upcycle.data.manifest import (
    describe_anew,
    finish_blend,
    shortfalls,
    texts_of,
)
from nemo_upcycle.data.tokenizers import save_tokenizer
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.fetch import ensure_dense, tokenizer_folder
from nemo_upcycle.utils.files import (
    MARKER,
    aside_of,
    in_use,
    is_complete,
    marker_of,
    read_json,
    require_disk,
    resolved,
    write_json,
)
from nemo_upcycle.utils.masking import without_secrets, write_private


logger = logging.getLogger(__name__)
#: File in the build folder: the settings that the build was started with.
MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class CheckedBlend:
    """The checked inputs, tokenizer and engine of a blend.

    Attributes:
        inputs: files of every source and split.
        tokenizer: folder with the tokenizer.
        engine: versions of the data engine.
    """

    inputs: dict[str, dict[str, list[InputFile]]]
    tokenizer: Path
    engine: str


def check_blend(blend: Blend, work: Path) -> CheckedBlend:
    """Check everything that can be checked without reading all documents.

    Args:
        blend: the blend.
        work: folder for academic splits that must be rendered first.

    Raises:
        UpcycleError: a pattern matches nothing, the tokenizer or the data environment is missing, the first documents
            of a source contain no text, ...
    """
    named = named_tokenizer(blend.config.tokenizer)
    check_suites(blend.suites, blend.config.decontaminate_without)
    engine = engine_version(data_python())
    tokenizer = tokenizer_folder(named)
    inputs = {source: list_inputs(blend, source, work) for source in blend.config.sources}
    require_disjoint(inputs)
    for source, splits in inputs.items():
        if not reader_of(blend, source).renders:
            check_texts(blend, source, splits["train"])
    return CheckedBlend(inputs, tokenizer, engine)


def build_blend(
    blend: Blend, output: Path, engine_options: tuple[str, ...] = (), *, strict: bool = False
) -> dict[str, Any]:
    """Build a blend, or resume a stopped build; keep a finished folder of the same blend (see `changed_files`).

    Args:
        blend: blend to build.
        output: folder to make, on a disk that all workers share.
        engine_options: options of the engine, such as `("--workers", "8")`.
        strict: whether damaged input ends the build; otherwise it is counted and reported.

    Returns:
        The manifest.

    Raises:
        UpcycleError: `check_blend` refuses the blend, the folder contains something else, another process builds in
            this folder, the disk is full, or the engine failed.

    Example:
        >>> build_blend(read_blend("sotu", ["tokenizer=asset://smollm2-135m"]), Path("runs/data"))  # doctest: +SKIP
    """
    named_tokenizer(blend.config.tokenizer)
    made_from = without_secrets({"format": FORMAT, "blend": texts_of(blend.config), "strict": strict})
    _require_ours(output, made_from)  # before the lock, which would add a file to a foreign folder
    if not is_complete(output):
        data_python()
    with in_use(output):
        _require_ours(output, made_from)
        if is_complete(output):
            return describe_anew(blend, output)
        work = output / BUILD
        if not (work / BEGUN).is_file() and _noted(work / MADE_FROM) != made_from:
            shutil.rmtree(work, ignore_errors=True)
        write_json(work / MADE_FROM, made_from)
        checked = check_blend(blend, work)
        inputs = [file for splits in checked.inputs.values() for files in splits.values() for file in files]
        require_disk(output, 2 * sum(file.size_bytes or 0 for file in inputs), f"blend {blend.name}")
        tokenizer = save_tokenizer(checked.tokenizer, output / TOKENIZER)
        plan = make_plan(blend, checked.inputs, output, tokenizer) | {"strict": strict}
        items = _index(blend, work)
        write_private(work / "plan.json", json.dumps(plan, indent=2) + "\n")  # the engine needs unmasked addresses
        run_engine([str(work / "plan.json"), *engine_options], size_check(blend, work, plan))
        manifest = finish_blend(blend, output, len(plan["tasks"]), tokenizer, checked.engine, items)
        write_json(output / MARKER, {"made_from": made_from, "tokens": manifest["splits"]["train"]["tokens"]})
        for name in ("tokens", "duplicates", "overlap", "quotas"):
            shutil.rmtree(work / name, ignore_errors=True)
        for line in shortfalls(manifest):
            logger.warning(line)
        return manifest


def changed_files(blend: Blend, output: Path) -> dict[str, list[str]]:
    """Return the user's files that are `new`, `gone` or `changed` since a finished folder was built.

    Files are compared by size and time. Remote files, rendered files, and folders that an earlier version made are not
    compared.

    Args:
        blend: the blend.
        output: finished folder of the blend.

    Example:
        >>> changed_files(read_blend("mine.yaml"), Path("data/mine"))  # doctest: +SKIP
        {'new': ['/texts/added.jsonl']}
    """
    found: dict[str, list[str]] = {"new": [], "gone": [], "changed": []}
    for name, source in read_json(output / MANIFEST)["sources"].items():
        noted = {path: file for path, file in source.get("files", {}).items() if "modified_ns" in file}
        config = blend.config.sources.get(name)
        if config is None:
            found["gone"].append(f"source {name}")
            continue
        if not noted or any(is_address(entry) for split in SPLITS for entry in getattr(config, split)):
            continue
        try:
            now = _stamps(blend, name)
        except UpcycleError as error:
            found["gone"].append(error.subject)
            continue
        before = [[path, file["bytes"], file["modified_ns"]] for path, file in noted.items()]
        for how, paths in compare(before, now).items() if now else ():
            found[how] += paths
    return {how: paths for how, paths in found.items() if paths}


def update_blend(
    blend: Blend, output: Path, engine_options: tuple[str, ...] = (), *, strict: bool = False
) -> dict[str, Any]:
    """Build a blend as `build_blend` does, and rebuild it if its files changed after the folder was finished.

    To find duplicates, all texts must be compared with each other, so all texts are read again. The old folder stays
    in place until the new one is complete, and a stopped update can be resumed.

    Args:
        blend: blend to build.
        output: folder to make.
        engine_options: options of the engine, see `build_blend`.
        strict: whether damaged input ends the build; see `build_blend`.

    Raises:
        UpcycleError: see `build_blend`.
    """
    output = resolved(output)
    fresh, replaced = aside_of(output), output.with_name(f".{output.name}.replaced")
    if is_complete(fresh) and not output.exists():  # an update was killed between its two renames
        fresh.rename(output)
    manifest = build_blend(blend, output, engine_options, strict=strict)
    if not changed_files(blend, output):
        return manifest
    if is_complete(fresh) and changed_files(blend, fresh):
        shutil.rmtree(fresh)
    build_blend(blend, fresh, engine_options, strict=strict)
    shutil.rmtree(replaced, ignore_errors=True)
    output.rename(replaced)
    fresh.rename(output)
    shutil.rmtree(replaced)
    return describe_anew(blend, output)


def noted_options(output: Path, source: str) -> dict[str, Any] | None:
    """Return a source's options from the build of a folder; None if the folder has no such source or no text yet."""
    if is_complete(output):
        made_from = read_json(marker_of(output)).get("made_from")
    else:
        made_from = _noted(output / BUILD / MADE_FROM) if (output / BUILD / BEGUN).is_file() else {}
    noted = _with_defaults(made_from).get("blend", {}).get("sources", {}).get(source)
    return dict(noted["options"]) if noted else None


def cached_blend(name: str, dense: str) -> Path:
    """Return the cached folder of a blend that is tokenised for a dense model; build it on first use.

    Several ranks may call this at the same time: one builds the folder, the others wait.

    Args:
        name: name of the blend, as in `read_blend`.
        dense: address of the dense model.

    Raises:
        UpcycleError: see `build_blend`.
    """
    blend = read_blend(name, [f"tokenizer={ensure_dense(dense)}"])
    files = [stamp for source in blend.config.sources for stamp in _stamps(blend, source)]
    made_from = [FORMAT, dataclasses.asdict(blend.config), files]
    return cached_folder("blends", blend.name, made_from, partial(build_blend, blend))


def _stamps(blend: Blend, source: str) -> list[Stamp]:
    """Return path, size and time of each file that a source has on this machine."""
    files = [Path(file.path) for split in check_files(blend, source).values() for file in split]
    return stamps(path for path in files if path.is_file())


def _require_ours(output: Path, made_from: dict[str, Any]) -> None:
    """Refuse a folder unless it is empty or holds this blend, finished or begun."""
    begun = output / BUILD / MADE_FROM
    if is_complete(output):
        earlier = _with_defaults(read_json(marker_of(output)).get("made_from"))
    elif begun.is_file():
        earlier = _noted(begun)
        if not (output / BUILD / BEGUN).is_file():  # no text was read
            return
    elif not output.is_dir() or all(path.name == ".lock" or _is_begun(path) for path in output.iterdir()):
        return
    else:
        earlier = {}
    require_same(output, "blend", earlier, made_from)


def _noted(path: Path) -> dict[str, Any]:
    """Read the settings with which a build was started; return an empty dict if no build was started."""
    return _with_defaults(read_json(path)) if path.is_file() else {}


def _with_defaults(made_from: Any) -> dict[str, Any]:
    """Add defaults for settings that an earlier release did not have; return an empty dict if no blend was built."""
    if "blend" not in (made_from or {}):
        return {}
    default = texts_of(BlendConfig({"": SourceConfig([])}))
    blend = default | made_from["blend"]
    sources = {name: default["sources"][""] | source for name, source in blend["sources"].items()}
    return without_secrets(dict(made_from) | {"blend": blend | {"sources": sources}})


def _is_begun(path: Path) -> bool:
    """Return whether a folder is from a build that failed because the disk had no space for the first file."""
    return path.name == BUILD and path.is_dir() and all(file.name.startswith(".") for file in path.iterdir())


def _index(blend: Blend, work: Path) -> dict[str, Any] | None:
    """Build the index of the evaluation items to keep out of training, unless it exists; return its summary."""
    if not blend.config.decontaminate:
        return None
    path, summary = work / NGRAMS, work / "ngrams.json"
    if not (path.is_file() and summary.is_file()):
        write_json(summary, build_index(blend.suites, path, blend.config.decontaminate_without))
    return dict(read_json(summary))
