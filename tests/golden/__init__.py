"""Every recipe's configuration as text, one setting a line, so that a change is seen and reviewed.

The keys are what an override on the command line calls the settings. What the planner knows of the recipes without
importing NeMo, `conf/planning/recipes.yaml`, is made of them as well. After an intended change:

    python -m tests.golden
"""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.spec import UpcycleSpec


FOLDER = Path(__file__).parent
PLANNER = FOLDER.parents[1] / "conf/planning/recipes.yaml"
#: Rows of recipes/h100_table.py.
TABLE = ("llama32_1b", "llama32_3b", "qwen3_1p7b", "qwen3_4b", "qwen3_14b", "qwen3_32b", "olmo2_7b")
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
    "qwen3_8b_e8t2": ("qwen3_8b_e8t2", {}),
    "qwen3_8b_e8t2-fp8": ("qwen3_8b_e8t2", {"performance_mode": True, "fp8_recipe": "blockwise"}),
    "qwen3_8b_dense_ct": ("qwen3_8b_dense_ct", {}),
    **{f"{base}_{kind}": (f"{base}_{kind}", {}) for base in TABLE for kind in ("e8t2", "dense_ct")},
    "qwen3_600m_e8t2": ("qwen3_600m_e8t2", {}),
    "qwen3_600m_dense_ct": ("qwen3_600m_dense_ct", {}),
    "smollm2_135m_e8t2": ("smollm2_135m_e8t2", {}),
    "smollm2_135m_dense_ct": ("smollm2_135m_dense_ct", {}),
    **{
        f"{model}_{kind}_sft": (f"{model}_{kind}_sft", {})
        for model in ("llama3_8b", "qwen3_8b", "qwen3_600m", "smollm2_135m", "llama32_1b", "qwen3_1p7b")
        for kind in ("e8t2", "dense")
    },
}


def golden_path(name: str) -> Path:
    """Return the golden file of a name in `GOLDEN`."""
    return FOLDER / f"{name}.yaml"


def text_of(name: str) -> str:
    """Return what a golden file should hold: a YAML mapping of settings to values."""
    from nemo_upcycle import recipes
    from nemo_upcycle.trainers.nemo.recipes import settings

    recipe, arguments = GOLDEN[name]
    config = factory_of(getattr(recipes, recipe))(**arguments)
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    # What the processor can decides the demo's precision where there is no GPU.
    lines = [f"{key}: {value}" for key, value in settings(config) if not _depends_on_machine(recipe, key)]
    return "\n".join([f"# {recipe}({call}), made by `python -m tests.golden`.", *lines]) + "\n"


def factory_of(module: Any) -> Any:
    """Return what makes a module's recipe, a pretraining or a tuning."""
    return getattr(module, "pretrain_recipe", None) or module.finetune_recipe


def _depends_on_machine(recipe: str, key: str) -> bool:
    return recipe.startswith(("smollm2", "qwen3_600m")) and key.startswith("trainer.plugins")


def planner_text() -> str:
    """Return what the planner's file should hold: the dense parents' shapes, and what a step of a recipe works on."""
    from nemo_upcycle import recipes
    from nemo_upcycle.trainers.nemo.recipes import spec_of

    shapes, entries = {}, {}
    for name in sorted({recipe for recipe, _ in GOLDEN.values()}):
        module = getattr(recipes, name)
        factory = factory_of(module)
        recipe = factory()
        config = recipe.model.config
        spec = spec_of(recipe) if recipe.resume.restore_config.spec else None
        batch, length = recipe.data.global_batch_size, recipe.data.seq_length
        defaults = {
            "seq_length": length,
            "global_batch": batch,
            "capacity_factor": config.moe_expert_capacity_factor,
            "tokens": float(f"{recipe.trainer.max_steps * batch * length:.4g}"),
            "gradients": "fp32" if recipe.trainer.strategy.ddp.grad_reduce_in_fp32 else "bf16",
        }
        defaults |= {"lora": recipe.peft.dim} if getattr(recipe, "peft", None) else {}
        dense = re.sub(r"_(e\d+t\d+|dense)(_ct|_sft)?$", "", name)
        if spec is None and name.endswith("_ct"):
            shapes[dense] = _changed(asdict(_dense_architecture(config)), Architecture)
        h100 = "performance_mode" in inspect.signature(factory).parameters
        upcycling = _changed(spec.to_dict(), UpcycleSpec, "num_experts", "top_k") if spec else None
        inputs = {"dense": inspect.signature(factory).parameters["dense"].default}
        if spec:
            chain = module.pipeline_recipe()
            inputs = {key: getattr(chain, key) for key in ("dense", "data", "evaluation")}
        known = {"dense": dense, "spec": upcycling, "h100": h100, "defaults": defaults}
        entries[name] = known | {"inputs": inputs}
    lines = [
        "# What the planner knows of the recipes; made by `python -m tests.golden`. The keys are explained in",
        "# nemo_upcycle/planning/hardware.py and nemo_upcycle/models/architecture.py.",
    ]
    for key, values in (("shapes", shapes), ("recipes", entries)):
        lines += [f"{key}:", *(f"  {name}: {_flow(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def _dense_architecture(config: Any) -> Architecture:
    """Return the architecture of a dense NeMo model: what decides its FLOPs, its family and positions."""
    from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaConfig
    from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config

    from nemo_upcycle.models.megatron_config import architecture_of
    from nemo_upcycle.recipes.h100 import VOCABULARY
    from nemo_upcycle.trainers.nemo.olmo2 import Olmo2Config

    kind = config.__fn_or_cls__
    # Sequences of a recipe may be shorter than its parent's. NeMo has no class for SmolLM2; its config.json has these.
    vocab_size, positions = (49_152, 8192) if kind is LlamaConfig else (VOCABULARY, kind.seq_length)
    is_qwen3, is_olmo2 = issubclass(kind, Qwen3Config), issubclass(kind, Olmo2Config)
    if is_qwen3:
        vocab_size, positions = kind.vocab_size, kind.max_position_embeddings
    vocab_size = kind.vocab_size if is_olmo2 else vocab_size
    scaling = None
    if issubclass(kind, Llama31Config):
        scaling = {"rope_type": "llama3", "factor": config.scale_factor, "low_freq_factor": config.low_freq_factor}
        scaling |= {"high_freq_factor": config.high_freq_factor}
        scaling |= {"original_max_position_embeddings": config.old_context_len}
    sizes = asdict(architecture_of(config, vocab_size)) | {
        "hf_class": "Qwen3ForCausalLM" if is_qwen3 else "Olmo2ForCausalLM" if is_olmo2 else "LlamaForCausalLM",
        "rope_theta": float(config.rotary_base),
        "rope_scaling": scaling,
        "max_positions": positions,
    }
    return Architecture(**sizes)


def _changed(values: dict[str, Any], kind: type, *always: str) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, and those named."""
    defaults = {field.name: field.default for field in fields(kind)}
    return {name: value for name, value in values.items() if name in always or value not in (None, defaults[name])}


def _flow(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
