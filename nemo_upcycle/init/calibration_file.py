"""The calibration file: the rows of routers that are made of prompts.

`nemo_upcycle/online/calibration.py` writes it. All ranks read the same file, so that every layout has the same bits.
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

#: Of the file; and the only key of its metadata (several have no order, and the file not the same bytes twice), whose
#: value is the lineage in JSON.
FORMAT, LINEAGE = "nemo-upcycle calibration 1", "lineage"
#: Where a run keeps the one that it makes, in the folder of the stage that makes it.
NAME = "calibration.safetensors"
#: Name of a layer's tensor: the rows [C, D] of its router in float32.
ROUTER = "layers.{layer}.router"
_SHOWN_DIGITS = 12


class Calibration:
    """A calibration file, whose tensors are read layer by layer.

    Args:
        path: the file.

    Raises:
        UpcycleError: it is missing, damaged, or something else.
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
        if (got := self.lineage.get("format", "another file")) != FORMAT:
            raise UpcycleError(f"format of {path}", got=got, expected=FORMAT, fix=fix)
        self.path = path
        self.sha256 = sha256_file(path)

    @property
    def name(self) -> str:
        """What a receipt calls it: the first digits of its hash."""
        return f"calibration {self.sha256[:_SHOWN_DIGITS]}"

    def has(self, layer: int) -> bool:
        """Say whether it has a layer's router."""
        return ROUTER.format(layer=layer) in self._names

    def router(self, layer: int) -> torch.Tensor:
        """Read the rows of a layer's router, [C, D] in float32, whose logits spread by one over the prompts."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            rows: torch.Tensor = file.get_tensor(ROUTER.format(layer=layer))
            return rows


def calibration_of(spec: UpcycleSpec | None) -> Calibration | None:
    """Open the calibration file that a spec names; None where it needs none.

    Raises:
        SpecError: it needs one and names none.
        UpcycleError: the file is missing, damaged, or something else.
    """
    if spec is None or not spec.needs_calibration:
        return None
    if not spec.calibration:
        raise SpecError(
            field="calibration",
            kind="missing",
            got="is missing",
            expected=f"<router_init>={spec.router_init} reads its file",
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
        raise SpecError(field=name, kind="missing", got=f"{path} does not exist", fix="check the path")
