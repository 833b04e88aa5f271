"""The table of models that recipes are made of, one row each: `conf/planning/recipes.yaml` explains the keys.

The planner, the recipes of both trainers and the chains read it, so it stands in the lowest of these layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from nemo_upcycle.models.architecture import Architecture, DeltaLayers
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.conf import packaged, read_yaml


#: Of every upcycled model of the table.
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: What a tuning trains on and is asked, in a chain: the demo's conversations, for trying.
_TUNED_INPUTS = {"data": "chatterbot", "evaluation": "answers"}
#: Rank of LoRA's adapters, by default.
RANK = 8


@dataclass(frozen=True)
class Run:
    """GPUs and layout of a training.

    Args:
        gpus: ranks.
        tp: tensor parallelism of the attention; above 1 with sequence parallelism.
        pp: pipeline stages.
        vp: chunks of each stage.
        cp: ranks that share a sequence.
        precision: the name in Bridge's recipes; empty: bf16.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    precision: str = ""

    @property
    def layout(self) -> dict[str, int | None]:
        """Sizes of the layout, by the planner's names."""
        return {"tp": self.tp, "pp": self.pp, "vp": self.vp, "cp": self.cp}

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "CP": self.cp, "PP": self.pp, "VPP": self.vp or 1}
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "data parallelism alone"


@dataclass(frozen=True)
class ModelRow:
    """A dense parent, and how its upcycled model and its dense baseline are trained.

    Args:
        name: beginning of the recipes' names, before `_e8t2`.
        runs: GPU -> kind -> GPUs and layout.
        shape: architecture of the parent.
        training: the training's `seq_length`, `global_batch` and `tokens`, and a chain's `data` and `evaluation`.
        tuning: arguments of `tuning_recipe`; None: the model is not tuned.
        few_steps: whether the training only shows that the chain works; else it is the paper's.
        title, dense, trainers, nemo, nemo_fields, trained_as, trainer: as in the file.
    """

    name: str
    title: str
    dense: str
    runs: dict[str, dict[str, Run]]
    shape: Architecture
    training: dict[str, Any]
    tuning: dict[str, Any] | None = None
    few_steps: bool = False
    trainers: tuple[str, ...] | list[str] = ("nemo", "bridge")
    nemo: str = ""
    nemo_fields: dict[str, Any] = field(default_factory=dict)
    trained_as: str = "llama3_8b"
    trainer: str = ""

    @property
    def sizes(self) -> str:
        """Number of parameters of the upcycled model, as a text."""
        arch = self.shape.upcycled(SPEC)
        return f"{arch.total_params / 1e9:.2f}B parameters, {arch.active_params / 1e9:.2f}B active"

    def defaults(self, upcycled: bool, tuned: bool) -> dict[str, Any]:
        """Return the work of a recipe's step, by the names of `nemo-upcycle plan`'s options.

        Args:
            upcycled: whether the model has experts.
            tuned: whether it is tuned on conversations.
        """
        values = {name: self.training[name] for name in ("seq_length", "global_batch")}
        tokens, lora = self.training["tokens"], False
        if tuned and self.tuning:
            values = {"seq_length": self.tuning["seq_length"], "global_batch": self.tuning["global_batch_size"]}
            tokens = float(f"{self.tuning['max_steps'] * values['seq_length'] * values['global_batch']:.4g}")
            lora = self.tuning.get("peft_scheme") == "lora"
        values["capacity_factor"] = 4.0 if upcycled and not self.few_steps else None
        return values | {"tokens": tokens, "gradients": "fp32"} | ({"lora": RANK} if lora else {})


@cache
def models() -> dict[str, ModelRow]:
    """Read the rows, by their names."""
    table = read_yaml(packaged("planning") / "recipes.yaml")
    return {name: _row(name, dict(values), table) for name, values in table["models"].items()}


def _row(name: str, values: dict[str, Any], table: dict[str, Any]) -> ModelRow:
    kind, length = values.pop("training", "paper"), values.pop("seq_length", None)
    training = dict(table["trainings"][kind])
    if length:
        training["global_batch"] = training["global_batch"] * training["seq_length"] // length
        training["seq_length"] = length
    if tuning := dict(values.pop("tuning", None) or {}):
        tuning = table["tunings"][tuning.pop("tuning")] | tuning
    runs = {gpu: {one: Run(**run) for one, run in runs.items()} for gpu, runs in values.pop("runs").items()}
    shape = _shape(dict(values.pop("shape")))
    made: dict[str, Any] = {"runs": runs, "shape": shape, "training": training, "tuning": tuning or None}
    return ModelRow(name, few_steps=kind == "few_steps", **made, **values)


def _shape(values: dict[str, Any]) -> Architecture:
    """Return the architecture; of gated delta nets the row says which layers have attention in their place."""
    if nets := dict(values.pop("delta", {})):
        every = nets.pop("attention_every")
        pattern = tuple((layer + 1) % every != 0 for layer in range(values["num_layers"]))
        values["delta"] = DeltaLayers(pattern=pattern, **nets)
    return Architecture(**values)


@cache
def recipes(trainer: str = "") -> dict[str, tuple[ModelRow, bool, bool]]:
    """List the recipes by name: row, whether the model has experts, whether it is tuned.

    Args:
        trainer: one that has them; by default those of any.
    """
    found: dict[str, tuple[ModelRow, bool, bool]] = {}
    for name, row in models().items():
        if trainer and trainer not in row.trainers:
            continue
        found |= {f"{name}_e8t2": (row, True, False), f"{name}_dense_ct": (row, False, False)}
        found |= {f"{name}_e8t2_sft": (row, True, True), f"{name}_dense_sft": (row, False, True)} if row.tuning else {}
    return dict(sorted(found.items()))


def chain_inputs(name: str) -> dict[str, str]:
    """Say the `dense` of a recipe, and of one with experts, which has a chain, its `data` and `evaluation`."""
    row, upcycled, tuned = recipes()[name]
    dense = row.tuning.get("dense", row.dense) if tuned and row.tuning else row.dense
    others = _TUNED_INPUTS if tuned else {name: row.training[name] for name in ("data", "evaluation")}
    return {"dense": dense} | (others if upcycled else {})


@cache
def bridge_recipes() -> dict[str, str]:
    """Name the recipes of upcycled models in Bridge, for H100 in BF16, by the names of NeMo's."""
    found = {}
    for name, (row, upcycled, tuned) in recipes().items():
        if not upcycled or (tuned and "peft_scheme" in (row.tuning or {})):
            continue
        kind = name if tuned else f"{name}_pretrain"
        found[name] = bridge_name(kind, tuned_gpus(row) if tuned else row.runs["h100"]["e8t2"].gpus, "h100")
    return found


def tuned_gpus(row: ModelRow) -> int:
    """Say how many GPUs a tuning is for."""
    return 8 * (row.tuning or {}).get("num_nodes", 0) or 1


def bridge_name(kind: str, gpus: int, gpu: str, precision: str = "bf16") -> str:
    """Name a recipe as Bridge does."""
    return f"{kind}_{gpus}gpu_{gpu}_{precision}_config"


def tunes(recipe: str) -> bool:
    """Return whether a recipe of Bridge's tunes on conversations: its name then has the word `sft`.

    Example:
        >>> tunes("llama3_8b_e8t2_sft_64gpu_h100_bf16_config"), tunes("my_sft.recipes:pretraining")
        (True, False)
    """
    return re.search(r"(^|_)sft(_|$)", recipe.rpartition(":")[2]) is not None
