"""The files of a Hugging Face folder besides its weights: `config.json`, and the parent's tokenizer files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import both_ropes, moe_config
from nemo_upcycle.models.wrapper import Wrapper, around_text, read_config
from nemo_upcycle.utils.dtypes import dtype_name
from nemo_upcycle.utils.files import read_json, write_json


if TYPE_CHECKING:
    import torch

#: Files to copy unchanged. If a newer library saved the tokenizer again, an older library might not open it.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v[0-9]",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
#: Licence files have one of these names with one of these endings.
_LICENCES, _TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"), {"", ".txt", ".md", ".rst", ".html", ".pdf"}
#: Further files to copy if the model keeps its vision parts.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
#: Keys that make a loader import foreign code.
_CODE_KEYS = {"auto_map", "custom_pipelines", "custom_generate"}


def tokenizer_file_names(dense_folder: Path, *, sees: bool = False) -> list[str]:
    """Return the file names of the parent's tokenizer, chat templates, generation settings and licences.

    All other files are left out.

    Args:
        dense_folder: folder of the parent.
        sees: whether to include the settings of the parent's image processor.

    Raises:
        UpcycleError: a file is a link to a place outside the folder, so copying would publish a file by mistake.
    """
    patterns = (*_TOKENIZER_FILES, *_LICENCES, *(_PROCESSOR_FILES if sees else ()))
    found = {path for pattern in patterns for path in dense_folder.glob(pattern) if path.is_file()}
    found -= {path for name in _LICENCES for path in dense_folder.glob(name) if path.suffix.lower() not in _TEXTS}
    folder = dense_folder.resolve()
    # In the hub's cache, the files of a snapshot are links to the blobs of the same model.
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for path in sorted(found):
        if not any((target := path.resolve()).is_relative_to(home) for home in homes):
            raise UpcycleError(
                str(path),
                kind="refused",
                got=f"is a link to {target}, outside {dense_folder}",
                fix="put the file itself into the folder, or remove the link",
            )
    return sorted(str(path.relative_to(dense_folder)) for path in found)


def copy_tokenizer_files(dense_folder: Path, folder: Path, *, sees: bool = False) -> list[str]:
    """Copy the files of `tokenizer_file_names`, without keys that make a loader run code. Return their names."""
    names = tokenizer_file_names(dense_folder, sees=sees)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        settings = read_json(dense_folder / name) if name.endswith("_config.json") else None
        if isinstance(settings, dict) and settings.keys() & _CODE_KEYS:
            write_json(folder / name, _without_code(settings))
        else:
            shutil.copyfile(dense_folder / name, folder / name)
    return names


def _without_code(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _CODE_KEYS}


def write_config(
    dense_folder: Path,
    folder: Path,
    arch: Architecture,
    dtype: torch.dtype,
    router_aux_loss: float | None = None,
    *,
    wrapper: Wrapper | None = None,
) -> None:
    """Write the `config.json` of `arch` from the parent's file, without keys that make a loader run code.

    Args:
        dense_folder: folder of the parent.
        folder: folder to write to.
        arch: architecture of the model.
        dtype: type of the model's weights.
        router_aux_loss: see `moe_config`.
        wrapper: class that holds the model and the parent's other parts; None for only the text model.
    """
    config = _without_code(read_config(dense_folder))
    if arch.num_experts:
        config = moe_config(config, arch, router_aux_loss)
    else:
        config |= both_ropes(arch.rope_theta, arch.rope_scaling) | {"architectures": [arch.hf_class]}
    written = [config]
    if wrapper:
        written.append(around_text(_without_code(read_json(dense_folder / "config.json")), config, wrapper))
    for settings in written:
        settings["torch_dtype"] = dtype_name(dtype)
        settings.pop("dtype", None)
    write_json(folder / "config.json", written[-1])
