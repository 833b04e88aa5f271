"""Texts for trials: State of the Union addresses, and texts of Debian packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from nemo_upcycle.data.needs import Caches, Need, asset_need
from nemo_upcycle.data.readers import InputFile, Place, Reader, input_file, register


@register
class Sotu(Reader):
    """Reader of State of the Union addresses; an entry is a year, or the first and last of several years."""

    name, renders = "sotu", True

    def list_files(self, entries: list[str], options: dict[str, Any], at: Place) -> list[InputFile]:
        """See `Reader.list_files`."""
        from nemo_upcycle.sources.demo.asset_texts import address_files

        return [input_file(path, "text") for path in address_files(entries)]

    def needs(self, entries: list[str], options: Mapping[str, Any]) -> list[Need]:
        """See `Reader.needs`."""
        return [asset_need("sotu")]


@register
class Packages(Reader):
    """Reader of texts of Debian packages; an entry is the name of a package."""

    name, renders = "packages", True

    def list_files(self, entries: list[str], options: dict[str, Any], at: Place) -> list[InputFile]:
        """See `Reader.list_files`."""
        from nemo_upcycle.sources.demo.packages import package_texts

        return [input_file(package_texts(name), "jsonl") for name in dict.fromkeys(entries)]

    def needs(self, entries: list[str], options: Mapping[str, Any]) -> list[Need]:
        """See `Reader.needs`."""
        from nemo_upcycle.sources.demo.packages import package_texts

        return [
            Need(f"package {name}", "Debian's servers", partial(package_texts, name), partial(_has_texts, name))
            for name in entries
        ]


def _has_texts(name: str, caches: Caches) -> bool:
    return (caches.folder / "packages" / f"{name}.jsonl").is_file()
