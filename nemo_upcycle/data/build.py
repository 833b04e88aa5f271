"""Build a blend: check, plan the tasks, let the data engine clean and tokenise, merge, and write the manifest.

The folder that is made holds, when it is finished:

    tokens/SOURCE_SPLIT_NN_text_document.{bin,idx}   what is trained on and watched (Megatron's indexed datasets)
    heldout.jsonl         what perplexity is measured on
    tokenizer/            with the padding token that training needs
    contamination.json    which evaluation items were found, and where
    manifest.json         sources, licences, counts of every step, versions
    build/                what was removed and why; the engine's logs
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from nemo_upcycle.data.blend import SPLITS, Blend, BlendConfig, SourceConfig, read_blend
from nemo_upcycle.data.contamination import build_index, check_suites, merge_contamination
from nemo_upcycle.data.copies import is_address
from nemo_upcycle.data.dense import ensure_dense, tokenizer_folder
from nemo_upcycle.data.engine.plan import BEGUN
from nemo_upcycle.data.environment import data_python, engine_version, run_engine
from nemo_upcycle.data.finished import (
    BUILD,
    CONTAMINATION,
    FORMAT,
    HELDOUT,
    HELDOUT_OVERLAP,
    MANIFEST,
    TOKENIZER,
    TOKENS,
)
from nemo_upcycle.data.inputs import NGRAMS, InputFile, list_inputs, make_plan, reader_of, require_disjoint
from nemo_upcycle.data.manifest import (
    describe_anew,
    make_manifest,
    merge_heldout,
    merge_tokens,
    read_stats,
    shortfalls,
    texts_of,
)
from nemo_upcycle.data.sizes import size_check
from nemo_upcycle.data.tokenizers import save_tokenizer
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.files import (
    MARKER,
    aside_of,
    in_use,
    is_complete,
    read_json,
    require_disk,
    resolved,
    write_json,
)


logger = logging.getLogger(__name__)
#: Files that a message names of each kind.
_NAMED = 3


@dataclass(frozen=True)
class CheckedBlend:
    """A blend whose inputs, tokenizer and engine were checked; no document was read.

    Attributes:
        inputs: the files of every source and split.
        tokenizer: folder with the tokenizer.
        engine: versions of the data engine.
    """

    inputs: dict[str, dict[str, list[InputFile]]]
    tokenizer: Path
    engine: str


def check_blend(blend: Blend, work: Path) -> CheckedBlend:
    """Check everything that can be checked before documents are read.

    Args:
        blend: the blend.
        work: where academic splits are rendered.

    Raises:
        UpcycleError: a pattern matches nothing, the tokenizer or the data environment is missing, ...
    """
    named = _named_tokenizer(blend)
    check_suites(blend.config.decontaminate, blend.config.decontaminate_without)
    engine = engine_version(data_python())
    tokenizer = tokenizer_folder(named)
    inputs = {source: list_inputs(blend, source, work) for source in blend.config.sources}
    require_disjoint(inputs)
    return CheckedBlend(inputs, tokenizer, engine)


def _named_tokenizer(blend: Blend) -> str:
    if blend.config.tokenizer is None:
        raise UpcycleError(
            "tokenizer",
            got="none",
            expected="the dense model whose tokenizer is used",
            fix="add tokenizer=FOLDER, or hf://ORG/NAME",
        )
    return blend.config.tokenizer


def build_blend(
    blend: Blend, output: Path, engine_options: tuple[str, ...] = (), *, strict: bool = False
) -> dict[str, Any]:
    """Build a blend, or continue a stopped build; a finished one of the same blend is kept (see `changed_files`).

    Args:
        blend: what to build.
        output: the folder to make, on a disk that all workers share.
        engine_options: how the engine runs, as `("--workers", "8")`.
        strict: whether damaged input ends the build; otherwise it is counted and reported.

    Returns:
        The manifest.

    Raises:
        UpcycleError: as in `check_blend`; or the folder holds something else, another process builds it, the disk is
            full, or the engine failed.

    Example:
        >>> build_blend(read_blend("sotu", ["tokenizer=asset://smollm2-135m"]), Path("runs/data"))  # doctest: +SKIP
    """
    _named_tokenizer(blend)
    if not is_complete(output):
        data_python()
    with in_use(output):
        made_from = {"format": FORMAT, "blend": texts_of(blend.config), "strict": strict}
        if _is_done(output, made_from):
            return describe_anew(blend, output)
        work = output / BUILD
        write_json(work / "made_from.json", made_from)
        checked = check_blend(blend, work)
        inputs = [file for splits in checked.inputs.values() for files in splits.values() for file in files]
        require_disk(output, 2 * sum(file.size_bytes or 0 for file in inputs), f"blend {blend.name}")
        tokenizer = save_tokenizer(checked.tokenizer, output / TOKENIZER)
        plan = make_plan(blend, checked.inputs, output, tokenizer) | {"strict": strict}
        plan = _as_begun(work / "plan.json", plan)
        items = _index(blend, work)
        write_json(work / "plan.json", plan)
        run_engine([str(work / "plan.json"), *engine_options], size_check(blend, work, plan))
        manifest = _finish(blend, output, read_stats(work, len(plan["tasks"])), tokenizer, checked.engine, items)
        write_json(output / MARKER, {"made_from": made_from, "tokens": manifest["splits"]["train"]["tokens"]})
        for name in ("tokens", "duplicates", "overlap", "quotas"):
            shutil.rmtree(work / name, ignore_errors=True)
        for line in shortfalls(manifest):
            logger.warning(line)
        return manifest


def changed_files(blend: Blend, output: Path) -> dict[str, list[str]]:
    """Return the user's files that are `new`, `gone` or `changed` since a finished folder was made of them.

    Size and time of a file are compared. Not compared are sources at addresses and those that are rendered first, and
    those of a folder that an earlier version made.

    Args:
        blend: the blend.
        output: its finished folder.

    Example:
        >>> changed_files(read_blend("mine.yaml"), Path("data/mine"))  # doctest: +SKIP
        {'new': ['/texts/added.jsonl']}
    """
    found: dict[str, list[str]] = {"new": [], "gone": [], "changed": []}
    for name, source in read_json(output / MANIFEST)["sources"].items():
        before = {path: file for path, file in source.get("files", {}).items() if "modified_ns" in file}
        config = blend.config.sources.get(name)
        if config is None:
            found["gone"].append(f"source {name}")
            continue
        if not before or any(is_address(entry) for split in SPLITS for entry in getattr(config, split)):
            continue
        try:
            files = check_files(blend, name)
        except UpcycleError as error:
            found["gone"].append(error.subject)
            continue
        now = {
            file.path: Path(file.path).stat() for split in files.values() for file in split if "://" not in file.path
        }
        found["new"] += [path for path in now if path not in before]
        found["gone"] += [path for path in before if now and path not in now]
        found["changed"] += [
            path
            for path, file in before.items()
            if path in now and (now[path].st_size, now[path].st_mtime_ns) != (file["bytes"], file["modified_ns"])
        ]
    return {how: paths for how, paths in found.items() if paths}


def changes_text(changes: dict[str, list[str]], output: Path) -> str:
    """Say which files are new, gone or changed, the first ones by name.

    Example:
        >>> changes_text({"new": ["/texts/a.txt", "/texts/b.txt"]}, Path("data"))
        'since data was made 2 files are new (/texts/a.txt, /texts/b.txt)'
    """
    kinds = []
    for how, paths in changes.items():
        more = f", and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        kinds.append(
            f"{len(paths):,} {'files are' if len(paths) > 1 else 'is'} {how} ({', '.join(paths[:_NAMED])}{more})"
        )
    return f"since {output} was made {', '.join(kinds)}"


def update_blend(
    blend: Blend, output: Path, engine_options: tuple[str, ...] = (), *, strict: bool = False
) -> dict[str, Any]:
    """Build a blend as `build_blend` does, and again if its files changed since its folder was finished.

    Removals look at all texts together, so all are read again; the folder stays as it is until the new one is whole,
    and a stopped update resumes.

    Args:
        blend: what to build.
        output: the folder to make.
        engine_options: as in `build_blend`.
        strict: as in `build_blend`.

    Raises:
        UpcycleError: as in `build_blend`.
    """
    output = resolved(output)
    fresh, replaced = aside_of(output), output.with_name(f".{output.name}.replaced")
    if is_complete(fresh) and not output.exists():  # killed between the two names
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


def cached_blend(name: str, dense: str) -> Path:
    """Return the folder of a blend that is tokenised for a dense model, built once, in the cache.

    Several ranks may call it at the same time: one builds it, the others wait.

    Args:
        name: of the blend, as in `read_blend`.
        dense: the dense model, by address.

    Raises:
        UpcycleError: as in `build_blend`.
    """
    blend = read_blend(name, [f"tokenizer={ensure_dense(dense)}"])
    digest = hashlib.sha256(json.dumps([FORMAT, dataclasses.asdict(blend.config), _stamps(blend)]).encode())
    output = writable_cache("blends") / f"{blend.name}-{digest.hexdigest()[:16]}"
    with FileLock(f"{output}.lock"):
        build_blend(blend, output)
    return output


def _stamps(blend: Blend) -> list[tuple[str, int, int]]:
    """Return path, size and time of the user's own files: other texts under the same names are another blend."""
    files = [file for name in blend.config.sources for files in check_files(blend, name).values() for file in files]
    paths = [Path(file.path) for file in files if Path(file.path).is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def check_files(blend: Blend, source: str) -> dict[str, list[InputFile]]:
    """Return the files of a source that names files; nothing of one that has to be fetched or rendered first.

    Raises:
        UpcycleError: as in `list_inputs`.
    """
    return {} if reader_of(blend, source).renders else list_inputs(blend, source, Path())


def _is_done(output: Path, made_from: dict[str, Any]) -> bool:
    """Return whether the folder is finished; refuse one that holds something else."""
    begun = output / BUILD / "made_from.json"
    if is_complete(output):
        earlier = _with_defaults(read_json(output / MARKER).get("made_from", {}))
    elif begun.is_file():
        earlier = _with_defaults(read_json(begun))
        if earlier != made_from and not (output / BUILD / BEGUN).is_file():  # nothing was read yet
            shutil.rmtree(output / BUILD)
            return False
        if _with_sources_of(earlier, made_from) == made_from:
            return False
    elif all(path.name == ".lock" or _is_begun(path) for path in output.iterdir()):
        return False
    else:
        earlier = {}
    if earlier and earlier["format"] != FORMAT:
        raise UpcycleError(
            f"format of {output}",
            got=earlier["format"],
            expected=FORMAT,
            fix="an earlier version made it: remove it first, or choose another folder",
        )
    if earlier != made_from:
        differs = [key for key, value in made_from["blend"].items() if earlier and earlier["blend"].get(key) != value]
        raise UpcycleError(
            str(output),
            got=f"another blend's ({', '.join(differs) or 'strict'} differ)" if earlier else "files that are not ours",
            expected="an empty folder, or this blend's",
            fix="choose another folder, or remove it first",
        )
    return is_complete(output)


def _with_defaults(made_from: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of later settings to what an earlier release noted."""
    if not made_from:
        return made_from
    default = texts_of(BlendConfig({"": SourceConfig([])}))
    blend = default | made_from["blend"]
    sources = {name: default["sources"][""] | source for name, source in blend["sources"].items()}
    return made_from | {"blend": blend | {"sources": sources}}


def _with_sources_of(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what a build was made from, without the sources that were taken out since."""
    named = now["blend"]["sources"]
    kept = {name: source for name, source in earlier["blend"]["sources"].items() if name in named}
    return {**earlier, "blend": {**earlier["blend"], "sources": kept}}


def _as_begun(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Return a plan with the task numbers of an earlier one, in which sources that were taken out read nothing."""
    if not path.is_file():
        return plan
    begun = read_json(path)
    names = {task["source"] for task in plan["tasks"]}
    if [task for task in begun["tasks"] if task["source"] in names] != plan["tasks"]:
        return plan
    tasks = [task if task["source"] in names else task | {"files": [], "options": {}} for task in begun["tasks"]]
    return plan | {"tasks": tasks} | {key: begun[key] for key in ("finders", "heldout_overlap")}


def _is_begun(path: Path) -> bool:
    """Return whether a folder is all that a build made before its first file, for which there was no room."""
    return path.name == BUILD and path.is_dir() and not any(path.iterdir())


def _index(blend: Blend, work: Path) -> dict[str, Any] | None:
    """Build the index of the evaluation items that must not be trained on, once; return what is in it."""
    if not blend.config.decontaminate:
        return None
    path, summary = work / NGRAMS, work / "ngrams.json"
    if not (path.is_file() and summary.is_file()):
        write_json(summary, build_index(blend.config.decontaminate, path, blend.config.decontaminate_without))
    return dict(read_json(summary))


def _finish(
    blend: Blend,
    output: Path,
    stats: list[dict[str, Any]],
    tokenizer: dict[str, Any],
    engine: str,
    items: dict[str, Any] | None,
) -> dict[str, Any]:
    """Merge what the engine wrote, and write contamination.json and manifest.json."""
    config, work = blend.config, output / BUILD
    merged = merge_tokens(work, output / TOKENS, config.sources, stats)
    heldout = merge_heldout(work, output / HELDOUT, stats)
    if items is not None:
        removed = merge_contamination((entry["contamination"] for entry in stats), items["sets"])
        left = merge_contamination((entry["report"] for entry in stats), items["report"]["sets"])
        write_json(output / CONTAMINATION, items | {"sets": removed, "report": items["report"] | {"sets": left}})
    overlap = read_json(work / HELDOUT_OVERLAP) if (work / HELDOUT_OVERLAP).is_file() else None
    manifest = make_manifest(blend, output, stats, merged, heldout, overlap, tokenizer, engine, bool(items))
    write_json(output / MANIFEST, manifest)
    return manifest
