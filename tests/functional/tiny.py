"""A tiny dense parent with texts, and the demo's recipes shrunk to its size."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.pipeline.stages import RunPlan
from tests.blends import write_blend
from tests.models import write_llama, write_tokenizer


SEQUENCE, BATCH, LAYERS, EXPERTS, PADDED_VOCAB = 64, 4, 4, 8, 512
#: Sizes with which the demo's model trains many steps per second.
SIZES = {
    "num_layers": LAYERS,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": SEQUENCE,
    # The loss includes padding rows, so every layout needs equally many of them: pad to one size under TP1 and TP2.
    "make_vocab_size_divisible_by": PADDED_VOCAB // 2,
}
#: A suite that evaluates WINDOWS windows of held-out text.
EVALUATION = """
tasks: {heldout_perplexity: [0]}
local: true
seed: 1234
questions: {per_subject: 1, total: 1, max_characters: 150}
heldout: {window_bytes: 128, windows: WINDOWS}
batch_size: 4
"""
_WORDS = ["the", "state", "of", "our", "union", "is", "strong", "every", "expert", "was", "dense", "before"]
_WORDS += ["learning"]


def texts(words: int = 600) -> dict[str, list[str]]:
    """Return the texts of each split; a training text has `words` words."""
    numbers = random.Random(0)
    sizes = {"train": words, "validation": words // 2, "heldout": 100}
    return {
        split: [" ".join(numbers.choices(_WORDS, k=count)) + f" {split} {number}" for number in range(3)]
        for split, count in sizes.items()
    }


def write_texts(folder: Path) -> Path:
    """Write texts and the blend's YAML file, and return the YAML file."""
    for split, documents in texts().items():
        (folder / split).mkdir(parents=True)
        for number, text in enumerate(documents):
            (folder / split / f"{number}.txt").write_text(text)
    return write_blend_file(folder)


def write_blend_file(folder: Path, *lines: str) -> Path:
    """Write a blend's YAML file for the texts in a folder, add further lines, and return the file."""
    splits = [f'    {split}: ["{folder / split}/*.txt"]' for split in texts()]
    config = folder / "blend.yaml"
    config.write_text("\n".join(["sources:", "  words:", *splits, *lines]) + "\n")
    return config


def write_parent(folder: Path, **changes: Any) -> Path:
    """Write the dense parent, with tied embeddings like the demo's."""
    return write_tokenizer(write_llama(folder, tied=True, **({"vocab_size": 259} | changes)))


def write_inputs(folder: Path) -> Path:
    """Write the inputs of `tiny_pipeline` and of a chain's plan: parent, texts and evaluation; return the folder."""
    write_parent(folder / "parent")
    write_texts(folder / "texts")
    (folder / "evaluation.yaml").write_text(EVALUATION.replace("WINDOWS", "4"))
    return folder


def write_finished_inputs(folder: Path, **changes: Any) -> Path:
    """Write a parent, its tokenised texts (`blend`, without the engine) and an evaluation; return the folder."""
    write_blend(folder / "blend", write_parent(folder / "parent", **changes), texts=texts())
    (folder / "evaluation.yaml").write_text(EVALUATION.replace("WINDOWS", "4"))
    return folder


def prepare(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Write parent and tokenised texts; return their folders."""
    dense = write_parent(folder / "dense", **changes)
    return dense, write_blend(folder / "data", dense, texts=texts())


def shrink(recipe: Any, *, max_steps: int, checkpoint_every: int | None) -> Any:
    """Shrink a recipe of the demo to the tiny model, in place; `checkpoint_every=None` saves no checkpoint."""
    import nemo_run as run
    from nemo import lightning as nl

    for name, value in SIZES.items():
        setattr(recipe.model.config, name, value)
    recipe.data.seq_length, recipe.data.global_batch_size = SEQUENCE, BATCH
    recipe.trainer.max_steps = max_steps
    recipe.trainer.limit_val_batches, recipe.trainer.val_check_interval = 0, 1
    recipe.trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32", params_dtype=torch.float32)
    recipe.optim.config.lr = 1e-3
    if checkpoint_every:
        recipe.log.ckpt.every_n_train_steps = checkpoint_every
    else:
        recipe.log.ckpt.save_top_k, recipe.log.ckpt.save_last = 0, False
    return recipe


def write_plan(folder: Path) -> RunPlan:
    """Write the inputs of a tiny run of the demo, and return its plan."""
    from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe

    write_inputs(folder)
    texts = {
        name: dump_recipe(shrink(module.pretrain_recipe(), max_steps=6, checkpoint_every=2))
        for name, module in (("pretrain", smollm2_135m_e8t2), ("dense_ct", smollm2_135m_dense_ct))
    }
    inputs = [str(folder / name) for name in ("parent", "texts/blend.yaml", "evaluation.yaml")]
    return RunPlan("smollm2_135m_e8t2", *inputs, **texts)


def tiny_pipeline(inputs: Path, run_dir: Path, moe: Any, dense_ct: Any) -> Any:
    """Return the demo's chain on the parent, texts and evaluation in `inputs`, with shrunk recipes."""
    import nemo_run as run

    from nemo_upcycle.pipeline.nemo.pipeline import pipeline

    return run.Partial(
        pipeline,
        dir=str(run_dir),
        dense=str(inputs / "parent"),
        data=str(inputs / "texts/blend.yaml"),
        evaluation=str(inputs / "evaluation.yaml"),
        pretrain=shrink(moe, max_steps=6, checkpoint_every=2),
        dense_ct=shrink(dense_ct, max_steps=6, checkpoint_every=2),
    )
