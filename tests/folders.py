"""Changes to Hugging Face folders that tests need: convert them, change a setting, change tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import Conversion, convert
from nemo_upcycle.utils.files import read_json, write_json


SPEC = UpcycleSpec(num_experts=4, top_k=2)


def converted(parent: Path | Sequence[Path], output: Path, spec: UpcycleSpec = SPEC, **options: Any) -> Conversion:
    """Convert one parent, or several parents into one MoE."""
    with open_dense(parent) as dense:
        return convert(dense, output, spec, progress=False, **options)


def change_config(folder: Path, **changes: Any) -> Path:
    """Change settings in a folder's config.json; a value of `...` removes the setting."""
    settings = read_json(folder / "config.json") | changes
    write_json(folder / "config.json", {name: value for name, value in settings.items() if value is not ...})
    return folder


def change_weights(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """Change tensors in a folder's only weights file; a value of None removes the tensor."""
    tensors = load_file(folder / "model.safetensors") | dict(changes)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
