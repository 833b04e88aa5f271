"""Find the model that an address names, and check the files that are on this machine. Nothing is fetched.

Commands that must answer at once import this module, so it imports torch only inside functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import check_parent
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.tokenizer_files import check_tokenizer


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ModelAddress(NamedTuple):
    """A parsed model address.

    Attributes:
        kind: `asset`, `hub`, `nemo` (a NeMo or Megatron checkpoint) or `folder`.
        name: name of the asset, name on the hub, or path.
    """

    kind: str
    name: str


def find_parent(source: str, *, nemo: bool = False) -> ModelAddress:
    """Find the model that an address names, for every command, stage and recipe. Nothing is fetched.

    Args:
        source: `asset://NAME`, `hf://ORG/NAME`, plain `ORG/NAME`, or a folder as a plain path, `hf:///absolute/path`
            or `nemo:///absolute/path`.
        nemo: whether a NeMo or Megatron checkpoint is accepted.

    Raises:
        UpcycleError: the scheme or the asset does not exist, or the folder does not exist (CheckpointError).

    Example:
        >>> find_parent("hf://meta-llama/Meta-Llama-3-8B")
        ModelAddress(kind='hub', name='meta-llama/Meta-Llama-3-8B')
    """
    if source in ("", "hf://", "nemo://"):
        raise UpcycleError(
            "The name of the model", kind="missing", got="is empty", fix="give a folder or hf://ORG/NAME"
        )
    scheme, separator, rest = source.partition("://")
    if not separator:
        scheme, rest = "", source
    elif scheme == "asset":
        from nemo_upcycle.sources.demo.assets import ASSETS

        models = [key for key, asset in ASSETS.items() if asset.kind == "model"]
        if rest not in models:
            raise UpcycleError.unknown("model asset", rest, models)
        return ModelAddress("asset", rest)
    elif scheme == "nemo" and nemo:
        return ModelAddress("nemo", rest)
    elif scheme == "nemo":
        raise CheckpointError(
            source,
            kind="refused",
            got="is a NeMo or Megatron checkpoint",
            expected="a Hugging Face folder, hf://ORG/NAME or asset://NAME is needed",
            fix="export it with NeMo's llm.export_ckpt first",
        )
    elif scheme != "hf":
        raise UpcycleError.unknown("address scheme", scheme, ("asset", "hf", "nemo"))
    path = Path(rest).expanduser()
    if path.is_dir():
        return ModelAddress("folder", str(path))
    is_mistyped = not scheme and path.parent.is_dir()  # models/lama beside models/llama is a typo
    if is_mistyped or not _HUB_NAME.fullmatch(rest):
        raise CheckpointError.no_path(
            "model folder", rest, "give a Hugging Face folder, hf://ORG/NAME or asset://NAME"
        )
    return ModelAddress("hub", rest)


@dataclass(frozen=True)
class Parent:
    """A dense parent, given by its address. Local files are opened once, on first use.

    Every property raises an UpcycleError if the address is wrong, and a CheckpointError if the model cannot be a
    parent.

    Args:
        address: address of a model, see `find_parent`, or of a NeMo or Megatron checkpoint; empty for no parent.
    """

    address: str

    @property
    def folder(self) -> Path | None:
        """Folder that the address names, if it is on this machine. Nothing is checked."""
        folder = Path(self.address.removeprefix("hf://")).expanduser()
        return folder if self.address and folder.is_dir() else None

    @cached_property
    def architecture(self) -> Architecture | None:
        """Architecture, or None if the model must still be fetched. NeMo and Megatron checkpoints are accepted."""
        from nemo_upcycle.sources.megatron_checkpoint import is_megatron
        from nemo_upcycle.sources.resolve import open_dense

        if not self.address.startswith("nemo://") and not is_megatron(Path(self.address)):
            return self.configured
        with open_dense(self.address) as dense:  # a checkpoint needs no tokenizer
            return dense.architecture

    @cached_property
    def configured(self) -> Architecture | None:
        """Like `whole`, but a folder with only a configuration is accepted, to show what a run would do."""
        kind, name = find_parent(self.address)
        if kind != "folder" or not is_configuration(Path(name)):
            return self.whole
        architecture = read_architecture(Path(name))
        check_parent(architecture, name)
        return architecture

    @cached_property
    def whole(self) -> Architecture | None:
        """Architecture of a folder with weights and tokenizer, or None if the model must still be fetched."""
        kind, name = find_parent(self.address)
        if kind != "folder":
            return None
        require_tokenizer(Path(name))
        from nemo_upcycle.sources.resolve import open_dense

        with open_dense(name) as dense:
            return dense.architecture


def is_configuration(folder: Path) -> bool:
    """Return whether a folder holds a model's configuration but no weights in any format."""
    weights = ("*.safetensors*", "*.bin*", "*.pt*", "*.gguf")
    return (folder / "config.json").is_file() and not any(True for kind in weights for _ in folder.glob(kind))


def require_tokenizer(folder: Path) -> None:
    """Check that a folder holds a tokenizer that opens.

    Without a tokenizer, transformers guesses one from the path's name.

    Raises:
        CheckpointError: there is no tokenizer, or the file is damaged.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"Folder {folder}",
            kind="missing",
            got=f"has no tokenizer ({', '.join(_TOKENIZER_FILES)})",
            fix="copy the model's tokenizer files into it",
        )
    check_tokenizer(folder)
