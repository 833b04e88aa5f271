"""Recipes named and shaped like Megatron-Bridge's own; `register` lets Bridge's commands find them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.planning.recipe_table import SPEC, ModelRow, Run, bridge_name, models, tuned_gpus
from nemo_upcycle.trainers.bridge.recipes import runs
from nemo_upcycle.trainers.bridge.recipes.common import parent_of
from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig


Recipe = Callable[[], UpcyclingConfig]
#: Makes a recipe's configuration from the address of the parent.
_Maker = Callable[[str], UpcyclingConfig]


def named_recipes() -> dict[str, Recipe]:
    """Make the recipes of the table's rows, for all GPUs, by their names."""
    found: dict[str, Recipe] = {}
    for row in models().values():
        for gpu, kinds in row.runs.items():
            for kind, run in kinds.items():
                found |= _pretraining(row, gpu, kind, run)
        if row.tuning and "peft_scheme" not in row.tuning:  # Bridge saves LoRA's adapters alone
            found |= _tunings(row, row.tuning)
    return found


def register() -> None:
    """Let Bridge find these recipes: it looks in its package of recipes, and for H100 alone in those of families."""
    import megatron.bridge.recipes

    for name, recipe in named_recipes().items():
        setattr(megatron.bridge.recipes, name, recipe)


def _named(name: str, text: str, dense: str, make: _Maker) -> dict[str, Recipe]:
    def recipe() -> UpcyclingConfig:
        return make(parent_of(None, default=dense))

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = text
    return {name: recipe}


def _pretraining(row: ModelRow, gpu: str, kind: str, run: Run) -> dict[str, Recipe]:
    """Make the recipe of a kind of run on a GPU: dense, e8t2, hybridep or fast.

    Racks of GB200, whose GPUs are all joined by NVLink, have HybridEP, as Bridge's own recipes of Qwen3-MoE for them.
    """
    layout: dict[str, Any] = run.layout | {"seq_length": row.training["seq_length"]}
    nvlink = known_gpu(gpu).nvlink_gpus
    make: _Maker
    if row.few_steps:
        make = partial(runs.small_run, spec=SPEC if kind == "e8t2" else None)
    elif kind == "dense":
        make = partial(runs.dense_run, **layout)
    elif kind == "fast":
        is_mx = run.precision == "fp8mx"
        fast = runs.mxfp8_run if is_mx else partial(runs.fast_run, precision=runs.PRECISIONS[run.precision])
        make = partial(fast, **layout)
    elif kind == "hybridep" or nvlink > 8:
        make = partial(runs.hybridep_run, nvlink_gpus=nvlink, **layout)
    else:
        make = partial(runs.upcycled_run, **layout)
    model = f"{row.name}_{'dense_ct' if kind == 'dense' else 'e8t2'}_pretrain"
    name = bridge_name(model, run.gpus, gpu, run.precision or ("bf16_hybridep" if kind == "hybridep" else "bf16"))
    what = "dense baseline" if kind == "dense" else "training, upcycled to 8 experts, top-2"
    return _named(name, f"Make the {kind} run of {row.title}, {what}: {run}.", row.dense, make)


def _tunings(row: ModelRow, tuning: dict[str, Any]) -> dict[str, Recipe]:
    """Make the tunings of the upcycled model and of the dense one on conversations, for H100.

    Each upcycles its dense parent as it starts, by Bridge's `pretrain`, for its `finetune` has to find a checkpoint.
    The data are a finished folder of `nemo-upcycle chat`, which `dataset.folder` names. The baseline has data
    parallelism alone.
    """
    dense, found = tuning.get("dense", row.dense), dict[str, Recipe]()
    for kind, what in (("e8t2", "upcycled"), ("dense", "dense")):
        spec, run = (SPEC, row.runs["h100"]["e8t2"]) if kind == "e8t2" else (None, Run(0))
        start: Any = runs.upcycled_run if spec else runs.dense_run
        base = partial(runs.small_run, spec=spec) if row.few_steps else partial(start, **run.layout)
        name = bridge_name(f"{row.name}_{kind}_sft", tuned_gpus(row), "h100")
        text = f"Make the tuning of {row.title} on conversations, {what}."
        found |= _named(name, text, dense, partial(_tuned, base, tuning))
    return found


def _tuned(base: _Maker, tuning: Mapping[str, Any], dense: str) -> UpcyclingConfig:
    return runs.tuned(base(dense), tuning)
