"""What stands around an upcycled text model as around its parent: the other parts, byte for byte, and names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.models.wrapper import Wrapper, tensor_names, wrapper_of
from nemo_upcycle.sources.base import DenseSource, OtherTensor
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.files import read_json
from nemo_upcycle.utils.streams import ByteRange, StreamedFile


_EMBEDDING = "embed_tokens.weight"
#: Which servers do not serve such a model, as `server_caveats` says it.
CAVEAT = "vLLM, SGLang, llama.cpp: none was tried with experts in a model that sees"


@dataclass(frozen=True)
class Whole:
    """The parts beside a text model, and how its tensors are called among them.

    Args:
        wrapper: the class around it.
        others: their tensors.
        body: what the names of the text model's tensors begin with, but for the output layer's.
    """

    wrapper: Wrapper
    others: tuple[OtherTensor, ...]
    body: str

    @classmethod
    def of(cls, dense: DenseSource) -> Whole | None:
        """Find the parts beside a parent's text model; None without any, or where its class takes no experts."""
        wrapper = wrapper_of(read_json(dense.path / "config.json"))
        names = tensor_names(dense.path) if wrapper and wrapper.takes_experts and dense.others() else None
        if wrapper is None or names is None:
            return None
        found = (name for name in names if name.endswith(_EMBEDDING) and not wrapper.part_of(name))
        body = next(found, f"model.{_EMBEDDING}").removesuffix(_EMBEDDING)
        return cls(wrapper, tuple(dense.others()), body)

    @classmethod
    def of_folder(cls, dense: Path) -> Whole | None:
        """Return the same of a parent's Hugging Face folder; None where that has no weights, too."""
        config = dense / "config.json"
        if not config.is_file() or wrapper_of(read_json(config)) is None or tensor_names(dense) is None:
            return None
        with SafetensorsFolder(dense) as parent:
            return cls.of(parent)

    @property
    def size_bytes(self) -> int:
        """The bytes of all other parts."""
        return sum(other.size_bytes for other in self.others)

    def called(self, name: str) -> str:
        """Give the name of a text model's tensor in the whole model, spelled as the parent spells it."""
        if name.startswith("model."):
            return self.body + name.removeprefix("model.")
        return f"language_model.{name}" if self.body == "language_model.model." else name


def copy_others(file: StreamedFile, others: list[OtherTensor], advance: Callable[[int], None]) -> None:
    """Append tensors to a file, byte for byte.

    Args:
        file: the open file, with its header.
        others: the tensors.
        advance: is told how many more are written.
    """
    for other in others:
        with Path(other.path).open("rb") as handle:
            file.copy(ByteRange(other.path, handle.fileno(), other.start_byte, other.size_bytes))
        advance(1)
