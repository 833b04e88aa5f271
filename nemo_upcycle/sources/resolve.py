"""Open a dense checkpoint by its address."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.families import check_parent
from nemo_upcycle.models.growth import require_one
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.megatron_checkpoint import MegatronCheckpoint, is_megatron
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.sources.several_parents import NON_EXPERT_WEIGHTS, Branches


_SCHEMES = {"hf": SafetensorsFolder, "nemo": MegatronCheckpoint}


def open_dense(uri: str | Path | Sequence[str | Path], *, non_expert_weights: str = "first") -> DenseSource:
    """Open a dense checkpoint for reading slices.

    Args:
        uri: a folder as a plain path (its contents decide the kind), as `hf:///absolute/path` (Hugging Face
            safetensors) or as `nemo:///absolute/path` (NeMo 2 or Megatron distributed checkpoint). It can also be
            several folders. Their feed-forward networks then become experts in turn.
        non_expert_weights: "first" or "mean". With several checkpoints, all weights except the experts come from the
            first checkpoint, or are the mean of all checkpoints.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is neither a dense Llama-family model nor a
            model with experts that can get more experts.
        SpecError: `non_expert_weights` is neither "first" nor "mean".

    Example:
        >>> with open_dense("hf:///models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     dense.architecture.num_layers
        32
    """
    check_non_expert_weights(non_expert_weights)
    uris = [uri] if isinstance(uri, str | Path) else uri
    if len(uris) == 1:
        return _open_one(str(uris[0]))
    with ExitStack() as opened:
        sources = [opened.enter_context(_open_one(str(one))) for one in uris]
        require_one([source.architecture for source in sources])
        branches = Branches(sources, non_expert_weights)
        opened.pop_all()
    return branches


def check_non_expert_weights(which: str) -> None:
    """Check the choice of non-expert weights for several parents, before anything is fetched.

    Raises:
        SpecError: the choice is neither "first" nor "mean".
    """
    if which not in NON_EXPERT_WEIGHTS:
        raise SpecError.unknown("non_expert_weights", which, NON_EXPERT_WEIGHTS)


def _open_one(uri: str) -> DenseSource:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme not in _SCHEMES:
        raise CheckpointError.unknown("address scheme", scheme, _SCHEMES)
    path = Path(rest if separator else uri)
    if separator and not path.is_absolute():
        raise CheckpointError(
            uri,
            kind="refused",
            got="is a name on the hub" if scheme == "hf" else "is a relative path",
            fix=(
                f"download the model first (hf download {rest} --local-dir FOLDER), and give "
                f"{scheme}:///absolute/path. `nemo-upcycle convert` and the pipeline download models by themselves"
            )
            if scheme == "hf"
            else f"write {scheme}:///absolute/path",
        )
    kind = _SCHEMES[scheme] if separator else MegatronCheckpoint if is_megatron(path) else SafetensorsFolder
    source: DenseSource = kind(path)
    check_parent(source.architecture, str(path))
    return source
