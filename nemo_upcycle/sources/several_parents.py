"""Mix several dense models: each becomes experts, and all other weights come from the first model or from the mean.

Branch-Train-MiX (arXiv 2403.07816, section 2): copies of one seed model are trained separately on different domains
and become the experts of one MoE. Everything else is averaged, and the router is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.mapping import hf_names
from nemo_upcycle.sources.base import DenseSource, Index, OtherTensor
from nemo_upcycle.utils.streams import ByteRange


#: Source of all weights except the experts: the first model, or the mean of all models.
NON_EXPERT_WEIGHTS = ("first", "mean")
#: The maximum sequence length does not change the weights, and checkpoint formats store this length differently.
_MAY_DIFFER = ("max_positions",)


def require_copies(dense: DenseSource, copies: int) -> None:
    """Check that every dense model of a source becomes an expert.

    Args:
        dense: open source of one model, or of several.
        copies: number of copies of the feed-forward network in a layer, `UpcycleSpec.copies`.

    Raises:
        SpecError: there are more models than copies, so some models would be left out.
    """
    if (branches := len(dense.branches())) > copies:
        raise SpecError(
            "number of parents",
            got=branches,
            expected=f"at most {copies}, the number of copies of the network",
            fix="give fewer parents, or more experts",
        )


class Branches:
    """Dense models of one architecture. Copy c of the feed-forward network comes from model c % (number of models).

    The step-0 model does not compute the function of any parent. A mean is computed from slices of every parent, and
    `bytes_read` counts all these slices.

    Args:
        sources: open sources, two or more; the first one names the result. Closing this source closes all of them.
        non_expert_weights: source of all weights except the routed experts: "first" is the first model; "mean" is the
            mean of all models, computed in float32 and cast back to the type on disk.

    Raises:
        CheckpointError: the sources differ in architecture, tensors or types.

    Example:
        >>> code, law = open_dense("models/code"), open_dense("models/law")  # doctest: +SKIP
        >>> with Branches([code, law], non_expert_weights="mean") as dense:  # doctest: +SKIP
        ...     receipt = upcycle_into(model_chunks, dense, UpcycleSpec(num_experts=4, top_k=2))
    """

    def __init__(self, sources: Sequence[DenseSource], non_expert_weights: str = "first") -> None:
        self._sources, self._non_expert_weights = tuple(sources), non_expert_weights
        self.path = sources[0].path
        self.architecture: Architecture = sources[0].architecture
        for source in sources[1:]:
            self._check(source)

    def _check(self, source: DenseSource) -> None:
        first, mine, other = self._sources[0], self.architecture, source.architecture
        names = [field.name for field in fields(mine) if field.name not in _MAY_DIFFER]
        names.sort(key=lambda name: name != "hf_class")  # a different class explains the other differences
        pairs = [(name, getattr(mine, name), getattr(other, name)) for name in names]
        if differing := [pair for pair in pairs if pair[1] != pair[2]]:
            raise self._differ(source, *differing[0])
        for name in hf_names(mine):
            for what in ("shape", "dtype"):
                expected, got = (getattr(one, what)(name) for one in (first, source))
                if expected != got:
                    raise self._differ(source, f"{what} of {name}", expected, got)

    def _differ(self, source: DenseSource, what: str, expected: object, got: object) -> CheckpointError:
        return CheckpointError(
            f"{what} of {source.path}",
            got=got,
            expected=f"{expected}, as in {self.path}",
            fix="mix models that were trained from one parent",
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of all slices read so far, over all sources."""
        return sum(source.bytes_read for source in self._sources)

    def names(self) -> Iterable[str]:
        """Return the names of the first model's tensors."""
        return self._sources[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._sources[0].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._sources[0].dtype(name)

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Read a slice of a tensor outside the routed experts: the first model's, or the mean of all models.

        Args:
            name: the tensor.
            index: (start, stop) along every axis; the whole tensor if None.

        Raises:
            CheckpointError: a source cannot be read.
        """
        if self._non_expert_weights == "first":
            return self._sources[0].read(name, index)
        self.prefetch(name, index)
        total = self._sources[0].read(name, index).to(torch.float32, copy=True)
        for source in self._sources[1:]:
            total += source.read(name, index)
        return (total / len(self._sources)).to(self.dtype(name))

    def prefetch(self, name: str, index: Index | None = None) -> None:
        """Start to fetch a slice that will be read soon."""
        for source in self._sources if self._non_expert_weights == "mean" else self._sources[:1]:
            source.prefetch(name, index)

    def byte_range(self, name: str, index: Index | None = None) -> ByteRange | None:
        """Return where the bytes of a slice are in the first model's files. A mean is in no file."""
        return self._sources[0].byte_range(name, index) if self._non_expert_weights == "first" else None

    def release(self) -> None:
        """Free the memory that the sources' files use in this process."""
        for source in self._sources:
            source.release()

    def fingerprint(self) -> dict[str, str]:
        """Identify the files of all sources, under their paths."""
        return {
            f"{source.path}/{file}": mark for source in self._sources for file, mark in source.fingerprint().items()
        }

    def others(self) -> Sequence[OtherTensor]:
        """Return the tensors in the first model's files that do not belong to the text model."""
        return self._sources[0].others()

    def branches(self) -> Sequence[DenseSource]:
        """Return the sources."""
        return self._sources

    def inexact_because(self) -> tuple[str, ...]:
        """Return why step 0 computes no parent's function: the experts differ, and the rest may be a mean."""
        rest = "their mean" if self._non_expert_weights == "mean" else "the first one's"
        return (
            (
                f"experts come from {len(self._sources)} dense models and the rest is {rest}, so step 0 computes no "
                "single parent's function"
            ),
        )

    def __enter__(self) -> Branches:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._sources:
            source.__exit__(None, None, None)
