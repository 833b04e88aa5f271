"""Resolved recipes as text, one setting per line, so that reviewers see every change of a setting.

After an intended change, write the files again:

    python -m tests.golden

Each setting has the name that a command-line override uses. Eight files contain all settings of a recipe. In
`pairs.yaml`, each recipe of `recipes/` has only the settings that a test compares with Megatron-Bridge's recipe.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_upcycle.recipes import known_recipes
from nemo_upcycle.spec import UpcycleSpec


FOLDER = Path(__file__).parent
PAIRS = FOLDER / "pairs.yaml"
#: File name -> recipe and its arguments.
GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama3_8b_e8t2", "qwen3_14b_e8t2", "qwen3_32b_dense_ct")},
    **{name: (name, {}) for name in ("llama32_1b_e8t2_sft", "smollm2_135m_e8t2")},
    "llama3_8b_e8t2-fast": ("llama3_8b_e8t2", {"performance_mode": True}),
    "llama3_8b_e8t2-dropless-fp8-deepep": (
        "llama3_8b_e8t2",
        {"capacity_factor": 0.0, "fp8_recipe": "delayed", "dispatcher": "deepep"},
    ),
    "llama3_70b_e8t2-fp8": ("llama3_70b_e8t2", {"performance_mode": True, "fp8_recipe": "blockwise"}),
}
#: `LAYOUT` and `TRAINING`: setting in Bridge -> setting in NeMo. Both settings have the same value if a recipe exists
#: for both trainers.
_LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("context_parallel_size", "sequence_parallel"),
)
LAYOUT = {f"model.{name}": f"trainer.strategy.{name}" for name in _LAYOUT}
_EXPERTS = (
    *("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_aux_loss_coeff"),
    *("moe_router_pre_softmax", "recompute_modules"),
)
_RANKS = ("expert_model_parallel_size", "expert_tensor_parallel_size")
TRAINING = {
    **{f"model.{name}": f"model.config.{name}" for name in _EXPERTS},
    **{f"model.{name}": f"trainer.strategy.{name}" for name in _RANKS},
    "dataset.seq_length": "data.seq_length",
    "model.seq_length": "data.seq_length",
    "train.global_batch_size": "data.global_batch_size",
    "train.micro_batch_size": "data.micro_batch_size",
    "train.train_iters": "trainer.max_steps",
    "validation.eval_interval": "trainer.val_check_interval",
    "validation.eval_iters": "trainer.limit_val_batches",
    "optimizer.lr": "optim.config.lr",
    "optimizer.min_lr": "optim.lr_scheduler.min_lr",
    "scheduler.lr_warmup_iters": "optim.lr_scheduler.warmup_steps",
    "optimizer.weight_decay": "optim.config.weight_decay",
    "scheduler.start_weight_decay": "optim.config.weight_decay",
    "scheduler.end_weight_decay": "optim.config.weight_decay",
    **{f"optimizer.{name}": f"optim.config.{name}" for name in ("adam_beta1", "adam_beta2", "adam_eps", "clip_grad")},
    "ddp.grad_reduce_in_fp32": "trainer.strategy.ddp.grad_reduce_in_fp32",
    "checkpoint.save_interval": "log.ckpt.every_n_train_steps",
    "checkpoint.most_recent_k": "log.ckpt.keep_last",
}
#: Further NeMo settings that the comparison needs.
_OTHERS = ("tokenizer", "resume.restore_config.path", "trainer.num_nodes", "trainer.devices")
#: Defaults of settings that NeMo's recipes omit.
_SPEC = asdict(UpcycleSpec())
_DEFAULTS = {"trainer.strategy.expert_model_parallel_size": 1, "data.micro_batch_size": 1}


def golden_path(name: str) -> Path:
    """Return the golden file of a key of `GOLDEN`."""
    return FOLDER / f"{name}.yaml"


def text_of(name: str) -> str:
    """Return the expected content of a golden file: a YAML mapping of settings to values."""
    from nemo_upcycle import recipes
    from nemo_upcycle.trainers.nemo.recipes import every_setting

    recipe, arguments = GOLDEN[name]
    config = factory_of(getattr(recipes, recipe))(**arguments)
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    # Without a GPU, the demo's precision depends on the processor, so it is omitted.
    lines = [
        f"{key}: {value}"
        for key, value in every_setting(config)
        if not (recipe.startswith("smollm2") and key.startswith("trainer.plugins"))
    ]
    return "\n".join([f"# {recipe}({call}), made by `python -m tests.golden`.", *lines]) + "\n"


def factory_of(module: Any) -> Any:
    """Return the function that makes a module's recipe, for pretraining or fine-tuning."""
    return getattr(module, "pretrain_recipe", None) or module.finetune_recipe


def pairs_text() -> str:
    """Return the expected content of `pairs.yaml`: recipe -> settings that are compared with Bridge, as JSON.

    The key of a recipe in performance mode has the suffix `-fast`.
    """
    from nemo_upcycle import recipes

    lines = ["# What recipes in Bridge are compared with, made by `python -m tests.golden`."]
    for name, known in known_recipes().items():
        if "nemo" not in known.trainers:
            continue
        factory = factory_of(getattr(recipes, name))
        fast = {f"{name}-fast": {"performance_mode": True}} if known.spec and known.h100 else {}
        for key, arguments in ({name: {}} | fast).items():
            lines.append(f"{key}: {json.dumps(paired(factory(**arguments)))}")
    return "\n".join(lines) + "\n"


def paired(recipe: Any) -> dict[str, Any]:
    """Return the settings of a NeMo recipe that are compared with the recipe in Bridge."""
    from nemo_upcycle.trainers.nemo.recipes import every_setting, recipe_spec

    wanted = {*LAYOUT.values(), *TRAINING.values(), *_OTHERS}
    found = {key: json.loads(value.replace("'", '"')) for key, value in every_setting(recipe) if key in wanted}
    spec = recipe_spec(recipe) if recipe.resume.restore_config.spec else None
    changed = {name: value for name, value in asdict(spec).items() if value != _SPEC[name]} if spec else None
    return _DEFAULTS | found | {"spec": changed}
