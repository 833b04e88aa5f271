"""The dense model that a run starts from, as far as its configuration says it."""

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


#: Characters of a run's name: a folder's name has room for 255 bytes.
_NAME_CHARS = 60


@dataclass(frozen=True)
class FoundParent:
    """A dense model.

    Attributes:
        address: its absolute path, or its name on the hub.
        arch: its architecture.
        tokenizer: the folder of its tokenizer; None: of an asset that is still to be made.
    """

    address: str
    arch: Architecture
    tokenizer: Path | None

    @property
    def name(self) -> str:
        """Its name, as a folder of runs and a module of Python can have it."""
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
    """Find a dense model; of one on the hub configuration and tokenizer are fetched.

    Args:
        source: a folder, `hf://ORG/NAME`, `ORG/NAME` or `asset://NAME`.

    Raises:
        UpcycleError: there is none, its class is not known, or weights or a tokenizer are missing.
    """
    if source.startswith("nemo://"):
        checkpoint = source.removeprefix("nemo://")
        fix = f"export it first: `nemo-upcycle export {shlex.quote(checkpoint)} FOLDER`, then give that folder"
        raise CheckpointError(source, kind="refused", got="is a NeMo or Megatron checkpoint", fix=fix)
    found = find_parent(source)
    if found.kind == "asset":
        arch, made = known_parent(source), cached_asset(found.name)
        assert arch is not None  # every asset that is a model has a row in conf/planning/parents.yaml
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
