"""Check that a calibration file belongs to a dense model and a spec, before any parameter is written."""

from __future__ import annotations

import hashlib

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.init.calibration_file import Calibration, calibration_of
from nemo_upcycle.models.mapping import hf_names
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.spec import UpcycleSpec


_FIX = "make the file again from this parent and spec (nemo-upcycle calibrate)"
_SIZES = ("hidden_size", "ffn_size", "num_layers")


def parent_digest(dense: DenseSource) -> str:
    """Return a hash of the middle row of every tensor as float32, which tells dense models of one shape apart.

    The hash is the same for a Hugging Face folder and for a distributed checkpoint of the same weights. To compute it,
    only a few thousandths of the weights' bytes are read. If several models are mixed, the first one is hashed.

    Args:
        dense: open dense model.
    """
    first, digest = dense.branches()[0], hashlib.sha256()
    for name in hf_names(first.architecture):
        rows, *rest = first.shape(name)
        row = first.read(name, [(rows // 2, rows // 2 + 1), *((0, size) for size in rest)])
        digest.update(f"{name} {rows} {rest} ".encode())
        digest.update(row.to(torch.float32).contiguous().numpy().tobytes())
    first.release()
    return digest.hexdigest()


def require_calibration(dense: DenseSource, spec: UpcycleSpec) -> Calibration | None:
    """Check that the calibration file that a spec needs exists and belongs to this dense model, and return it.

    Args:
        dense: open dense model.
        spec: how the dense model is upcycled.

    Returns:
        The file, or None if the spec needs none.

    Raises:
        SpecError: the spec needs a calibration file and names none.
        CheckpointError: the file is from another model or from other settings.
        UpcycleError: the file is missing, damaged, or not a calibration file.
    """
    calibration = calibration_of(spec)
    if calibration is None:
        return None
    lineage, arch = calibration.lineage, dense.architecture.upcycled(spec)
    parent, settings = lineage["parent"], lineage["settings"]
    pairs = [(name, parent[name], getattr(dense.architecture, name)) for name in _SIZES]
    pairs += [(name, settings[name], getattr(spec, name)) for name in ("router_init", "copies")]
    for name, got, expected in pairs:
        if got != expected:
            raise _other(calibration, name, got, expected)
    for layer in range(arch.num_layers):
        if arch.is_moe_layer(layer) and not calibration.has(layer):
            got = f"has no rows for layer {layer}, which has experts (moe_layers={spec.moe_layers})"
            raise CheckpointError(str(calibration.path), kind="state", got=got, fix=_FIX)
    if (digest := parent_digest(dense)) != parent["sha256"]:
        got = f"was made from the weights of {parent['path']}, not from those of {dense.path} ({digest})"
        raise CheckpointError(str(calibration.path), kind="state", got=got, fix=_FIX)
    return calibration


def _other(calibration: Calibration, name: str, got: object, expected: object) -> CheckpointError:
    return CheckpointError(
        f"{name} of {calibration.path}",
        got=got,
        expected=f"{expected}, as in this parent and spec",
        fix=_FIX,
    )
