"""The calibration file: router rows that were computed from prompts.

`nemo_upcycle/online/calibration.py` writes the file. All ranks read the same file, so every layout gets the same bits.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import sha256_file


if TYPE_CHECKING:
    import torch

#: FORMAT is the format of the file. LINEAGE is the file's only metadata key, and its value is the lineage in JSON. A
#: second key would make the file's bytes differ from run to run, because metadata keys have no order.
FORMAT, LINEAGE = "nemo-upcycle calibration 1", "lineage"
#: File name of a calibration that a run computes itself, in the folder of the stage that computes it.
NAME = "calibration.safetensors"
#: Tensor name of a layer's router rows, [C, D] in float32.
ROUTER = "layers.{layer}.router"
_SHOWN_DIGITS = 12


class Calibration:
    """An open calibration file. Its tensors are read layer by layer.

    Args:
        path: calibration file.

    Raises:
        UpcycleError: the file is missing, damaged, or not a calibration file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        fix = "make it with nemo-upcycle calibrate"
        if not path.is_file():
            raise UpcycleError.no_path("calibration file", path, fix)
        try:
            with safe_open(path, "pt") as file:
                metadata, self._names = file.metadata() or {}, frozenset(file.keys())
        except (SafetensorError, OSError) as error:
            raise UpcycleError(
                f"Calibration file {path}", kind="state", got=f"is damaged ({error})", fix=fix
            ) from None
        self.lineage: dict[str, Any] = json.loads(metadata.get(LINEAGE, "{}"))
        if (got := self.lineage.get("format", "missing")) != FORMAT:
            raise UpcycleError(f"format of {path}", got=got, expected=FORMAT, fix=fix)
        self.path = path
        self.sha256 = sha256_file(path)

    @property
    def name(self) -> str:
        """Name in the receipt: `calibration` and the first digits of the file's hash."""
        return f"calibration {self.sha256[:_SHOWN_DIGITS]}"

    def has(self, layer: int) -> bool:
        """Return whether the file has a router for a layer."""
        return ROUTER.format(layer=layer) in self._names

    def router(self, layer: int) -> torch.Tensor:
        """Read a layer's router rows, [C, D] in float32.

        The rows are scaled so that the spread of the prompts' logits is 1, see `online.calibration.router_rows`.
        """
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            rows: torch.Tensor = file.get_tensor(ROUTER.format(layer=layer))
            return rows


def calibration_of(spec: UpcycleSpec | None) -> Calibration | None:
    """Open the calibration file that a spec names, or return None if the spec needs no calibration file.

    Raises:
        SpecError: the spec needs a calibration file, but names no calibration file.
        UpcycleError: the file is missing, damaged, or not a calibration file.
    """
    if spec is None or not spec.needs_calibration:
        return None
    if not spec.calibration:
        raise SpecError(
            field="calibration",
            kind="missing",
            got="is missing",
            expected=f"<router_init>={spec.router_init} needs a calibration file",
            fix="make the file with nemo-upcycle calibrate, and set <calibration> to its path",
        )
    path = Path(spec.calibration).expanduser()
    state = path.stat() if path.is_file() else None
    return _opened(path, (state.st_mtime_ns, state.st_size) if state else None)


@functools.lru_cache(maxsize=8)
def _opened(path: Path, state: tuple[int, int] | None) -> Calibration:
    """Open a calibration file and cache it. A changed file has another `state`, so it is opened again."""
    return Calibration(path)


def require_files(spec: UpcycleSpec) -> None:
    """Check that a spec's calibration file exists, or its file of prompts if the spec names no calibration file.

    Raises:
        SpecError: the file does not exist.
    """
    name = "calibration" if spec.calibration else "router_prompts"
    path = Path(getattr(spec, name)).expanduser()
    if getattr(spec, name) and not path.is_file():
        raise SpecError(field=name, kind="missing", got=f"{path} does not exist", fix="check the path")
