"""The receipt: how each parameter was made, on this rank and over all ranks, and how exact the model is."""

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
    """How one parameter of a rank was made.

    `sha256` is the hash of the parameter's bytes, if hashes were requested. For a parameter in FP8 or FP4, `dtype` is
    Transformer Engine's class, and `sha256` is the hash of the values before quantization.
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
    """A router's auxiliary loss: configured coefficient, effective coefficient under this layout, and the reason."""

    name: str
    coefficient: float
    acting: float
    why: str


@dataclass
class UpcycleReceipt:
    """The result of `upcycle_into` on one rank. `merge` combines the receipts of all ranks.

    The fields `*_params` are numbers of parameters of the whole model. `dense_params` is the number of parameters of
    the parent, whose layers have `parent_experts` experts. Bytes, seconds and `peak_rss_gib` (over the whole life of
    the process) are this rank's. After a merge, bytes are the sum over the ranks, and seconds and `peak_rss_gib` are
    the largest of any rank.

    `exact_masters` says whether master weights created later equal the filled values. `exact_masters` is False
    if a parameter is in FP8 or FP4 and its values before quantization do not exist any more. In this case the values
    were not kept, or an optimizer has already taken the values. `auxiliary_losses` are the auxiliary losses of the
    training. `balancing_bias` has the settings by which the training changes the routers' biases, with Megatron's
    names as keys. `left_out` gives the numbers of `tensors` and `bytes` for each part of the source outside the text
    model.
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
        """Return this receipt with the numbers of all ranks combined. `others` includes this receipt."""
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
        """Return the receipt as plain values, with the entries of `equivalence` at the top level."""
        value = asdict(self)
        equivalence, parameters = value.pop("equivalence"), value.pop("parameters")
        return numbered({**equivalence, **value, "parameters": parameters})

    def write(self, path: Path) -> None:
        """Write the receipt as JSON, atomically."""
        write_json(path, without_secrets(self.to_dict()))


def read_receipt(path: Path) -> dict[str, Any]:
    """Return a receipt as plain values, in the form of `UpcycleReceipt.to_dict`.

    Raises:
        UpcycleError: the file is missing, is not a receipt, or is from a newer release.
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
    """Return the spec from a receipt or from options, or None if both are missing.

    Args:
        fields: spec fields from the receipt; None without a receipt.
        path: file of the receipt, for error messages.
        given: spec fields that options set.
        unsaid: spec fields that are known from elsewhere, used only if there is no receipt.

    Raises:
        SpecError: an option contradicts the receipt, or a value is invalid.
        UpcycleError: the receipt's spec has an unknown field, or a value of the wrong type.
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
            fix="give a receipt that this version wrote, or give the spec as options",
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
