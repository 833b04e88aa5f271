"""The receipt: what was made of what, on this rank and over all ranks, and how faithful it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.package_info import __version__
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import read_json, write_json
from nemo_upcycle.utils.masking import without_secrets
from nemo_upcycle.utils.schema import numbered, require_known


@dataclass(frozen=True)
class ParameterRecord:
    """How one parameter of a rank was made; `sha256` is of its bytes, if hashes were asked for.

    Of a parameter in FP8 or FP4, `dtype` is Transformer Engine's class and `sha256` is of what was quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    made_by: str
    sources: tuple[str, ...]
    sha256: str | None = None
    rank: int = 0


@dataclass(frozen=True)
class ActingCoefficient:
    """The coefficient of an auxiliary loss of the router as it is set and as it acts on this layout, and why."""

    name: str
    coefficient: float
    acting: float
    why: str


@dataclass
class UpcycleReceipt:
    """What `upcycle_into` did on one rank; `merge` makes it that of all ranks.

    `*_params` count the whole model, `dense_params` its parent, whose layers have `parent_experts`. Bytes are this
    rank's until merged, then the sum over ranks; seconds and `peak_rss_gib` (of the process's whole life) then those
    of the slowest and the largest rank. `exact_masters` says whether master weights that are made from now on equal
    what was filled in: not where a parameter is in FP8 or FP4 and the values before are not kept, or no longer
    because an optimizer has taken them. `auxiliary_losses` are those that a training has, and `balancing_bias` is what
    moves the biases of its routers, by Megatron's name. `left_out` has what stands beside the text model in the
    source's files, part by part: `tensors` and `bytes`.
    """

    source: str
    source_files: dict[str, str]
    spec: dict[str, Any] | None
    exact: bool
    inexact_because: list[str]
    dense_params: int
    total_params: int
    active_params: int
    parameters: list[ParameterRecord]
    bytes_read: int
    bytes_needed: int
    bytes_written: int
    seconds: float
    peak_rss_gib: float
    parent_experts: int = 0
    parent_active_params: int | None = None
    exact_masters: bool = True
    ranks: int = 1
    layout: dict[str, int] = field(default_factory=dict)
    auxiliary_losses: list[ActingCoefficient] = field(default_factory=list)
    balancing_bias: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    equivalence: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def merge(self, others: list[UpcycleReceipt]) -> UpcycleReceipt:
        """Return this receipt with the numbers of all ranks (this one among `others`) added up."""
        merged = replace(self, ranks=len(others), exact_masters=all(other.exact_masters for other in others))
        for name in ("bytes_read", "bytes_needed", "bytes_written"):
            setattr(merged, name, sum(getattr(other, name) for other in others))
        for name in ("seconds", "peak_rss_gib"):
            setattr(merged, name, max(getattr(other, name) for other in others))
        merged.parameters = [
            replace(record, rank=rank) for rank, other in enumerate(others) for record in other.parameters
        ]
        return merged

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain values; the equivalence numbers stand at the top level."""
        value = asdict(self)
        equivalence, parameters = value.pop("equivalence"), value.pop("parameters")
        return numbered({**equivalence, **value, "parameters": parameters})

    def write(self, path: Path) -> None:
        """Write the receipt as JSON, atomically."""
        write_json(path, without_secrets(self.to_dict()))


def read_receipt(path: Path) -> dict[str, Any]:
    """Return a receipt as plain values, as `UpcycleReceipt.to_dict` makes them.

    Raises:
        UpcycleError: the file is missing, no receipt, or of a newer release.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("spec") or {}, dict):
        raise UpcycleError(
            str(path), kind="state", got="is not the receipt of an upcycling", fix="give the receipt.json of the run"
        )
    require_known(value, path)
    return value


def recorded_spec(
    fields: dict[str, Any] | None, path: Path | None, given: dict[str, Any], unsaid: dict[str, Any] | None = None
) -> UpcycleSpec | None:
    """Return the spec of a receipt, or of options; None if there is neither.

    Args:
        fields: fields of the receipt's spec; None without a receipt.
        path: the receipt's file, for the text of an error.
        given: fields that options set.
        unsaid: fields known from elsewhere, used only without a receipt.

    Raises:
        SpecError: an option contradicts the receipt, or a value is wrong.
        UpcycleError: the receipt's spec has an unknown field, or a value of another type.
    """
    try:
        spec = UpcycleSpec(**fields) if fields else None
        if spec is None:
            return UpcycleSpec(**((unsaid or {}) | given)) if given else None
    except (TypeError, ValueError, AttributeError) as error:
        raise UpcycleError(
            f"{path}: spec",
            kind="state",
            got=f"has fields that UpcycleSpec does not have ({error})",
            fix="give a receipt of this version, or name the options of the spec",
        ) from None
    changed = replace(spec, **given)
    for name in given:
        got, expected = getattr(changed, name), getattr(spec, name)
        if got != expected:
            raise SpecError(
                field=name,
                got=got,
                expected=f"{expected}, as in {path}",
                fix=f"omit <{name}>, or give another run's receipt (--receipt FILE)",
            )
    return spec
