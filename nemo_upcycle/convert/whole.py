"""Copy the parts outside a parent's text model byte for byte, and name the tensors of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.wrapper import MTP, Wrapper, tensor_names, wrapper_of
from nemo_upcycle.sources.base import DenseSource, OtherTensor
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.files import read_json
from nemo_upcycle.utils.streams import ByteRange, StreamedFile


_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Whole:
    """The parts outside a text model with experts, and the names of the text model's tensors in the whole model.

    Args:
        wrapper: class that holds all parts.
        others: tensors of the other parts.
        body: prefix of the text model's tensor names, except the output layer's.
        moe_arch: architecture of the text model inside `wrapper`.
    """

    wrapper: Wrapper
    others: tuple[OtherTensor, ...]
    body: str
    moe_arch: Architecture

    @classmethod
    def of(cls, dense: DenseSource, moe_arch: Architecture) -> Whole | None:
        """Find the parts outside a parent's text model.

        Return None if there are no such parts, or if `unseen_because` gives a reason.

        Args:
            dense: open parent.
            moe_arch: architecture of the upcycled text model.
        """
        parent = wrapper_of(read_json(dense.path / "config.json"))
        names = tensor_names(dense.path)
        if parent is None or names is None or not dense.others() or unseen_because(dense.path, moe_arch):
            return None
        found = (name for name in names if name.endswith(_EMBEDDING) and not parent.part_of(name))
        body = next(found, f"model.{_EMBEDDING}").removesuffix(_EMBEDDING)
        wrapper = parent.around_experts
        assert wrapper
        own = find_family(wrapper.hf_class)  # a family only if the text model has no class of its own
        moe_arch = replace(moe_arch, hf_class=own.hf_class) if own else moe_arch
        others = tuple(other for other in dense.others() if other.part != MTP)
        return cls(wrapper, others, body, moe_arch)

    @classmethod
    def of_folder(cls, dense: Path, moe_arch: Architecture) -> Whole | None:
        """Do the same as `of` for a parent's Hugging Face folder. Also return None if the folder has no weights."""
        config = dense / "config.json"
        if not config.is_file() or wrapper_of(read_json(config)) is None or tensor_names(dense) is None:
            return None
        with SafetensorsFolder(dense) as parent:
            return cls.of(parent, moe_arch)

    @property
    def size_bytes(self) -> int:
        """Size of all other parts (bytes)."""
        return sum(other.size_bytes for other in self.others)

    def called(self, name: str) -> str:
        """Return the name of a text model's tensor in the whole model, spelled as the parent spells it."""
        if name.startswith("model."):
            return self.body + name.removeprefix("model.")
        usual = "language_model." if self.body == "language_model.model." else ""
        return (self.wrapper.head or usual) + name


def unseen_because(dense: Path, moe_arch: Architecture) -> str:
    """Return why no class holds the parts outside a parent's text model together with experts.

    The result is "" if a class holds these parts, or if there are no such parts.

    Args:
        dense: Hugging Face folder of the parent.
        moe_arch: architecture of the upcycled text model.
    """
    config = dense / "config.json"
    parent = wrapper_of(read_json(config)) if config.is_file() else None
    if not parent:
        return ""
    if not (wrapper := parent.around_experts):
        return f"no known class has both {' and '.join(parent.parts)} and experts"
    family = find_family(wrapper.hf_class)
    reasons = ", ".join(family.unsupported(moe_arch)) if family else ""
    return f"{wrapper.hf_class} has no place for {reasons}" if reasons else ""


def copy_others(file: StreamedFile, others: list[OtherTensor], advance: Callable[[int], None]) -> None:
    """Append tensors to a file, byte for byte.

    Args:
        file: open file, after its header.
        others: tensors to copy.
        advance: called with the number of tensors that were just written.
    """
    for other in others:
        with Path(other.path).open("rb") as handle:
            file.copy(ByteRange(other.path, handle.fileno(), other.start_byte, other.size_bytes))
        advance(1)
