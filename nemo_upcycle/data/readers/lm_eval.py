"""The training splits of lm-eval's tasks, rendered in its own words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.readers import InputFile, Reader, register


@register
class LmEval(Reader):
    """An entry is a task or a group; the option is a folder with tasks of the user's own."""

    name, options, renders = "lm_eval", ("include_path",), True

    def list_files(self, entries: list[str], blend: Blend, options: dict[str, Any], work: Path) -> list[InputFile]:
        """See `Reader.list_files`."""
        from nemo_upcycle.data.academic import write_training_splits

        paths = [work / f"{task}.jsonl" for task in entries]
        if not all(path.is_file() for path in paths):
            own = options.get("include_path")
            write_training_splits(entries, work, blend.folder.absolute() / Path(own).expanduser() if own else None)
        return [InputFile(str(path.absolute()), "jsonl", path.stat().st_size) for path in paths]

    def paths(self, entries: list[str], options: Mapping[str, Any]) -> list[str]:
        """See `Reader.paths`: the user's own tasks."""
        return [f"{own}/*"] if (own := options.get("include_path")) else []
