"""Every recipe's configuration as text, one setting a line, so that a change is seen and reviewed.

The keys are what an override on the command line calls the settings. After a wanted change:

    python -m tests.golden
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parent
#: File name -> recipe and its arguments.
GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3_8b_e8t2": ("llama3_8b_e8t2", {}),
    "llama3_8b_e8t2-fast": ("llama3_8b_e8t2", {"performance_mode": True}),
    "llama3_8b_e8t2-fp8": ("llama3_8b_e8t2", {"performance_mode": True, "fp8_recipe": "blockwise"}),
    "llama3_8b_e8t2-dropless-fp8-deepep": (
        "llama3_8b_e8t2",
        {"capacity_factor": 0.0, "fp8_recipe": "delayed", "dispatcher": "deepep"},
    ),
    "llama3_8b_dense_ct": ("llama3_8b_dense_ct", {}),
    "llama31_8b_e8t2": ("llama31_8b_e8t2", {}),
    "llama31_8b_e8t2-fp8": ("llama31_8b_e8t2", {"performance_mode": True, "fp8_recipe": "tensorwise"}),
    "llama31_8b_dense_ct": ("llama31_8b_dense_ct", {}),
    "llama3_70b_e8t2": ("llama3_70b_e8t2", {}),
    "llama3_70b_e8t2-fp8": ("llama3_70b_e8t2", {"performance_mode": True, "fp8_recipe": "blockwise"}),
    "llama3_70b_dense_ct": ("llama3_70b_dense_ct", {}),
    "smollm2_135m_e8t2": ("smollm2_135m_e8t2", {}),
    "smollm2_135m_dense_ct": ("smollm2_135m_dense_ct", {}),
}


def golden_path(name: str) -> Path:
    """Return the golden file of a name in `GOLDEN`."""
    return FOLDER / f"{name}.yaml"


def text_of(name: str) -> str:
    """Return what a golden file should hold: a YAML mapping of settings to values."""
    from nemo_upcycle import recipes
    from nemo_upcycle.pipeline.recipes_io import settings

    recipe, arguments = GOLDEN[name]
    config = getattr(recipes, recipe).pretrain_recipe(**arguments)
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    # What the processor can decides the demo's precision where there is no GPU.
    lines = [f"{key}: {value}" for key, value in settings(config) if not _depends_on_machine(recipe, key)]
    return "\n".join([f"# {recipe}({call}), made by `python -m tests.golden`.", *lines]) + "\n"


def _depends_on_machine(recipe: str, key: str) -> bool:
    return recipe.startswith("smollm2") and key.startswith("trainer.plugins")
