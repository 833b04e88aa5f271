"""State of the Union addresses, for trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.needs import Need, asset_need
from nemo_upcycle.data.readers import InputFile, Reader, register


@register
class Sotu(Reader):
    """An entry is a year, or first and last of several."""

    name, renders = "sotu", True

    def list_files(self, entries: list[str], blend: Blend, options: dict[str, Any], work: Path) -> list[InputFile]:
        """See `Reader.list_files`."""
        from nemo_upcycle.demo.sotu import address_files

        return [InputFile(str(path), "text", path.stat().st_size) for path in address_files(entries)]

    def needs(self, entries: list[str], options: Mapping[str, Any]) -> list[Need]:
        """See `Reader.needs`."""
        return [asset_need("sotu")]
