"""The parent model of a run, as described by its configuration."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import check_parent, find_family
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.rotary import rope_kind
from nemo_upcycle.planning.hardware import known_parent
from nemo_upcycle.sources.fetch import OF_TOKENIZER, cached_asset, on_this_machine
from nemo_upcycle.sources.find import find_parent, require_tokenizer
from nemo_upcycle.utils.console import short_count
from nemo_upcycle.utils.files import is_complete


#: Largest number of characters in a run's name, because a folder's name may have 255 bytes.
_NAME_CHARS = 60


@dataclass(frozen=True)
class FoundParent:
    """The parent of a run.

    Attributes:
        address: absolute path, address on the hub, or asset.
        arch: architecture.
        tokenizer: folder of the tokenizer; None for an asset that has not been made yet.
    """

    address: str
    arch: Architecture
    tokenizer: Path | None

    @property
    def name(self) -> str:
        """The parent's name, restricted to characters that are valid in a folder's name and a Python module."""
        words = re.sub(r"\W+", "_", self.address.rstrip("/").rpartition("/")[2]).strip("_").lower()
        return words[:_NAME_CHARS].strip("_") or "model"

    @property
    def description(self) -> str:
        """Family, parameters, positions and tokenizer."""
        family = find_family(self.arch.hf_class)
        experts = f", {self.arch.num_experts} experts" if self.arch.num_experts else ""
        title = family.title if family else self.arch.hf_class
        return (
            f"{title}, {short_count(self.arch.total_params)} parameters{experts},"
            f" {self.arch.max_positions:,} positions, tokenizer of {self.arch.vocab_size:,}"
        )


def inspect_parent(source: str) -> FoundParent:
    """Find the parent model; fetch its configuration and tokenizer if it is on the hub.

    Args:
        source: a folder, `hf://ORG/NAME`, `ORG/NAME` or `asset://NAME`.

    Raises:
        UpcycleError: the model is missing, its class is unknown, or weights or a tokenizer are missing.
    """
    if source.startswith("nemo://"):
        checkpoint = source.removeprefix("nemo://")
        fix = f"export it first: `nemo-upcycle export {shlex.quote(checkpoint)} FOLDER`, then give that folder"
        raise CheckpointError(source, kind="refused", got="is a NeMo or Megatron checkpoint", fix=fix)
    found = find_parent(source)
    if found.kind == "asset":
        arch, made = known_parent(source), cached_asset(found.name)
        assert arch is not None  # conf/planning/parents.yaml has a row for every asset that is a model
        return FoundParent(source, arch, made if is_complete(made) else None)
    folder = on_this_machine(found, OF_TOKENIZER).absolute()
    arch = read_architecture(folder)
    check_parent(arch, source)
    arch.require_trained()
    rope_kind(arch)
    require_tokenizer(folder)
    if found.kind == "folder" and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"Model {source}", kind="missing", got="has no *.safetensors beside config.json", fix="copy them there"
        )
    return FoundParent(source if found.kind == "hub" else str(folder), arch, folder)
