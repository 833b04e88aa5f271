"""The texts of Debian's packages, for trials."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.needs import Caches, Need
from nemo_upcycle.data.readers import InputFile, Reader, register


@register
class Packages(Reader):
    """An entry is a package's name."""

    name, renders = "packages", True

    def list_files(self, entries: list[str], blend: Blend, options: dict[str, Any], work: Path) -> list[InputFile]:
        """See `Reader.list_files`."""
        from nemo_upcycle.demo.packages import package_texts

        paths = [package_texts(name) for name in dict.fromkeys(entries)]
        return [InputFile(str(path), "jsonl", path.stat().st_size) for path in paths]

    def needs(self, entries: list[str], options: Mapping[str, Any]) -> list[Need]:
        """See `Reader.needs`."""
        from nemo_upcycle.demo.packages import package_texts

        return [
            Need(f"package {name}", "Debian's servers", partial(package_texts, name), partial(_has_texts, name))
            for name in entries
        ]


def _has_texts(name: str, caches: Caches) -> bool:
    return (caches.folder / "packages" / f"{name}.jsonl").is_file()
