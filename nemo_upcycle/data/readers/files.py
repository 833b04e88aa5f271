"""The user's own files: paths, patterns and addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import is_pattern
from nemo_upcycle.data.readers import InputFile, Place, Reader, format_of, readable, register
from nemo_upcycle.errors import UpcycleError


@register
class Files(Reader):
    """Reader of files that paths, patterns and addresses name; the suffix of a file decides its format."""

    name, options = "files", ("text_key", "id_key")

    def list_files(self, entries: list[str], options: dict[str, Any], at: Place) -> list[InputFile]:
        """See `Reader.list_files`."""
        for name, value in options.items():
            if not isinstance(value, str):
                raise UpcycleError(
                    f"options.{name}", got=value, expected="the name of a field", fix=f"write {name}: text"
                )
        files: dict[str, InputFile] = {}
        for entry in entries:
            matches = sorted(_expand(entry, at.folder))
            if not matches:
                is_relative = "://" not in entry and not Path(entry).expanduser().is_absolute()
                fix = "check it" + " (a relative pattern starts from the folder of the YAML file)" * is_relative
                raise UpcycleError(f"Pattern {entry}", kind="missing", got="matches no file", fix=fix)
            for path, size_bytes in matches:
                if (format := format_of(path)) is None:
                    raise UpcycleError(
                        f"File {path}",
                        kind="refused",
                        got=f"has no supported text format ({readable()})",
                        fix="unpack it" if path.endswith(".zip") else "narrow the pattern",
                    )
                files[path] = InputFile(path, format, size_bytes, options)
        return list(files.values())


def _expand(pattern: str, folder: Path) -> list[tuple[str, int | None]]:
    """Return path and size of the files that a pattern matches."""
    import fsspec

    is_address = "://" in pattern
    try:
        whole = pattern if is_address else str(folder.absolute() / Path(pattern).expanduser())
        system, root = fsspec.core.url_to_fs(whole)
        if not is_pattern(whole):
            return [(whole, system.info(root).get("size"))] if system.isfile(root) else []
        matches = system.glob(root, detail=True)
    except FileNotFoundError:
        return []
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home for ~nobody
        raise UpcycleError(
            f"Address {pattern}",
            kind="state",
            got="cannot be reached (" + f"{type(error).__name__}: {error}".splitlines()[0] + ")",
            fix="check the address and the network, or give a folder with a copy of the files",
        ) from None
    # A link has another type than a file, and its size is not the size of the file.
    names = {
        name: entry.get("size") if entry["type"] == "file" else system.size(name)
        for name, entry in matches.items()
        if entry["type"] == "file" or (entry["type"] != "directory" and system.isfile(name))
    }
    return [(system.unstrip_protocol(name) if is_address else name, size_bytes) for name, size_bytes in names.items()]
