"""The calibration file: what one pass of a dense model over a sample of text found, and an upcycling reads.

Routers that are made of data have their rows in it, and a split by co-activation the order of every layer's neurons.
`nemo_upcycle/calibration` writes it. All ranks read the same file, so that every layout has the same bits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import sha256_file


if TYPE_CHECKING:
    import torch

#: Of the file; and the only key of its metadata (several have no order, and the file not the same bytes twice), whose
#: value is the lineage in JSON.
FORMAT, LINEAGE = "nemo-upcycle calibration 1", "lineage"
#: Where a run keeps the one that it makes, in the folder of the stage that makes it.
NAME = "calibration.safetensors"
#: What a layer's tensors are called: rows [C, D] of its router in float32; its neurons [F] in their order in int32.
ROUTER, NEURONS = "layers.{layer}.router", "layers.{layer}.neurons"
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class LayerSample:
    """What enters the MoE of a layer, of every token of a sample, in batches that do not depend on the machine.

    Args:
        batches: activations behind the norm, [N, D] in float32 each.
        labels: of each batch, which text it is of: the number of a source of the blend, or of an expert's prompts.
        copies: C, rows that are wanted.
        generator: of the layer's random numbers.
        run: applies a function to items, several at a time, and yields the results in order.
    """

    batches: Sequence[torch.Tensor]
    labels: Sequence[int]
    copies: int
    generator: torch.Generator
    run: Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@dataclass(frozen=True)
class NeuronOrder:
    """The order in which the neurons of a layer's dense network are cut into parts.

    Args:
        layer: number in the whole model.
        made_by: what the receipt says of it.
        neurons: their numbers, [F].
    """

    layer: int
    made_by: str
    neurons: torch.Tensor = field(compare=False, repr=False)


class Calibration:
    """A calibration file, whose tensors are read layer by layer.

    Args:
        path: of the file.

    Raises:
        UpcycleError: it is missing, damaged, or something else.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        fix = "make it with nemo-upcycle calibrate"
        if not path.is_file():
            raise UpcycleError(f"calibration file {path}", got="no such file", expected="one", fix=fix)
        try:
            with safe_open(path, "pt") as file:
                metadata, self._names = file.metadata() or {}, frozenset(file.keys())
        except (SafetensorError, OSError) as error:
            raise UpcycleError(f"calibration file {path}", got=error, expected="a whole file", fix=fix) from None
        self.lineage: dict[str, Any] = json.loads(metadata.get(LINEAGE, "{}"))
        if (got := self.lineage.get("format", "another file")) != FORMAT:
            raise UpcycleError(f"calibration file {path}", got=got, expected=FORMAT, fix=fix)
        self.path = path
        self.sha256 = sha256_file(path)

    @property
    def name(self) -> str:
        """What a receipt calls it: the first digits of its hash."""
        return f"calibration {self.sha256[:_SHOWN_DIGITS]}"

    def has(self, name: str, layer: int) -> bool:
        """Return whether it has a layer's `ROUTER` or `NEURONS`."""
        return name.format(layer=layer) in self._names

    def router(self, layer: int) -> torch.Tensor:
        """Return the rows of a layer's router, [C, D] in float32, whose logits spread by one over the sample."""
        return self._read(ROUTER, layer)

    def neurons(self, layer: int) -> NeuronOrder:
        """Return the order of a layer's neurons."""
        if layer not in self._orders:
            split = self.lineage["settings"]["expert_split"]
            self._orders[layer] = NeuronOrder(layer, f"{split} of {self.name}", self._read(NEURONS, layer).long())
        return self._orders[layer]

    @functools.cached_property
    def _orders(self) -> dict[int, NeuronOrder]:
        return {}

    def _read(self, name: str, layer: int) -> torch.Tensor:
        from safetensors import safe_open

        if not self.has(name, layer):
            raise CheckpointError.unknown(f"{self.path}: tensor", name.format(layer=layer), self._names)
        with safe_open(self.path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name.format(layer=layer))
            return tensor


def calibration_of(spec: UpcycleSpec | None) -> Calibration | None:
    """Return the calibration file that a spec names; None where it needs none.

    Raises:
        SpecError: it needs one and names none.
        UpcycleError: the file is missing, damaged, or something else.
    """
    if spec is None or not spec.needs_calibration:
        return None
    if not spec.calibration:
        raise SpecError(
            field="calibration",
            got="none",
            expected=f"the file that {_read_from_it(spec)}",
            fix="make it with nemo-upcycle calibrate, and name it",
        )
    path = Path(spec.calibration).expanduser()
    state = path.stat() if path.is_file() else None
    return _opened(path, (state.st_mtime_ns, state.st_size) if state else None)


@functools.lru_cache(maxsize=8)
def _opened(path: Path, state: tuple[int, int] | None) -> Calibration:
    """Open a file once for all tensors; another one of that name has another state."""
    return Calibration(path)


def require_files(spec: UpcycleSpec) -> None:
    """Check that the files which a spec names are there: the calibration, or the prompts that it is made of.

    Raises:
        SpecError: one is not.
    """
    name = "calibration" if spec.calibration else "router_prompts"
    path = Path(getattr(spec, name)).expanduser()
    if getattr(spec, name) and not path.is_file():
        raise SpecError(field=name, got=f"{path}, no such file", expected="a file", fix="check the path")


def _read_from_it(spec: UpcycleSpec) -> str:
    fields = [("router_init", spec.reads_router), ("expert_split", spec.reads_split)]
    names = [f"<{name}>={getattr(spec, name)}" for name, is_read in fields if is_read]
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} read from"


def neuron_order(spec: UpcycleSpec, layer: int | None) -> NeuronOrder | None:
    """Return the order in which a layer's neurons are cut into parts; None: the dense model's own.

    Args:
        spec: of the upcycled model.
        layer: number in the whole model.
    """
    if spec.expert_split == "consecutive" or layer is None:
        return None
    found = calibration_of(spec)
    return found.neurons(layer) if found else None


def scaled_rows(rows_CD: torch.Tensor, sample: LayerSample) -> torch.Tensor:
    """Return a router's rows without what they have in common, scaled so that their logits spread by one.

    The spread is the standard deviation of a token's logits over the copies, root mean square over the sample's
    tokens. What all rows share adds the same number to all logits of a token: it moves no softmax and no top-k.

    Args:
        rows_CD: the rows in float64.
        sample: of the layer.

    Raises:
        UpcycleError: the rows do not tell copies apart.
    """
    import torch

    size, rows_CD = float(rows_CD.norm()), rows_CD - rows_CD.mean(0)
    turned_DC = rows_CD.T.float().contiguous()

    def squares(batch_ND: torch.Tensor) -> torch.Tensor:
        return (batch_ND @ turned_DC).double().square_().mean(1).sum()  # their mean over the copies is zero

    tokens = sum(len(batch) for batch in sample.batches)
    spread = float(torch.stack(list(sample.run(squares, sample.batches))).sum() / tokens) ** 0.5
    if not (float(rows_CD.norm()) > 1e-6 * size and 0 < spread < float("inf")):
        raise UpcycleError(
            "rows of a router from data",
            got="NaN" if spread != spread else "the same for all copies",
            expected="rows that tell them apart",
            fix="give texts, or prompts, that differ",
        )
    scaled_CD: torch.Tensor = rows_CD / spread
    return scaled_CD
