"""List everything that a run needs from networks: its parent, its texts and the questions of its suites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_upcycle.data.blend import SPLITS, Blend, read_blend
from nemo_upcycle.data.copies import copied_files, copy_files
from nemo_upcycle.data.engine.lines import is_address
from nemo_upcycle.data.inputs import list_named, reader_of
from nemo_upcycle.data.needs import HUB, Caches, Need, asset_need, task_need
from nemo_upcycle.data.suites.suite import asks_mmlu
from nemo_upcycle.data.suites.suite_config import SuiteConfig
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.sources.fetch import import_dense, on_this_machine
from nemo_upcycle.sources.find import ModelAddress, find_parent
from nemo_upcycle.utils.cache import cache_folder


def run_needs(inputs: Inputs) -> list[Need]:
    """List everything that a run needs from networks, each item once. A finished folder of data needs nothing.

    Raises:
        UpcycleError: an input is invalid.
    """
    of = {
        "dense": _parent_needs(inputs.dense) if inputs.dense else (),
        "data": _data_needs(inputs),
        "evaluation": _suite_needs(inputs.suite_config) if inputs.suite else (),
    }
    found: dict[str, Need] = {}
    for name, needs in of.items():
        for need in needs:
            earlier = found.get(need.what, need)
            found[need.what] = replace(earlier, inputs=tuple(dict.fromkeys((*earlier.inputs, name))))
    return list(found.values())


def _parent_needs(dense: str) -> Iterator[Need]:
    parent = find_parent(dense)
    if parent.kind == "asset":
        yield asset_need(parent.name)
    elif parent.kind == "hub":
        fetch, is_in = partial(import_dense, dense, Path(), sampled=True), partial(_has_model, parent)
        yield Need(f"model {parent.name}", HUB, fetch, is_in)


def _has_model(parent: ModelAddress, caches: Caches) -> bool:
    from nemo_upcycle.sources.resolve import open_dense  # imports torch

    with suppress(UpcycleError), open_dense(on_this_machine(parent, offline=True, cache=caches.hub)):
        return True
    return False


def _data_needs(inputs: Inputs) -> Iterator[Need]:
    if "://" in inputs.data:  # addresses of texts, for `nemo-upcycle data` but not for a run
        yield from _blend_needs(read_blend(inputs.data))
    elif inputs.chat:
        yield from map(asset_need, inputs.chat.assets)
    elif inputs.blend:
        yield from _blend_needs(inputs.blend)


def _blend_needs(blend: Blend) -> Iterator[Need]:
    for name, source in blend.config.sources.items():
        reader = reader_of(blend, name)
        entries = [entry for split in SPLITS for entry in getattr(source, split)]
        yield from reader.needs(entries, source.options)
        if addresses := [entry for entry in reader.paths(entries, source.options) if is_address(entry)]:
            more = f" and {len(addresses) - 1} more" if addresses[1:] else ""
            scheme, _, rest = addresses[0].partition("://")
            yield Need(
                f"source {name} ({addresses[0]}{more})",
                HUB if scheme == "hf" else f"{scheme}://{rest.partition('/')[0]}",
                partial(_copy_source, blend, name),
                partial(_has_source, blend, name),
            )
    for suite in blend.suites.values():
        yield from _suite_needs(suite)


def _copy_source(blend: Blend, source: str) -> None:
    copy_files(blend, source, list_named(blend, source, Path()), cache_folder())


def _has_source(blend: Blend, source: str, caches: Caches) -> bool:
    return copied_files(blend, source, caches.folder) is not None


def _suite_needs(config: SuiteConfig) -> Iterator[Need]:
    if asks_mmlu(config):
        yield asset_need("mmlu")
    elif not config.local:
        yield from (task_need(name, config.include_path) for name in config.tasks if name not in config.files)
