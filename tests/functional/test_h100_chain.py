"""The chain of an H100 recipe, import to report, on eight ranks and a small parent: Qwen3 8B's, TP2 PP4 VPP2 EP2.

`tests/functional/test_h100_recipe.py` trains Llama 3 8B's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import is_complete, read_json
from tests.functional.stages import run_stages
from tests.functional.tiny import EVALUATION, write_texts
from tests.models import write_qwen3, write_tokenizer


pytestmark = [pytest.mark.slow, pytest.mark.full]
RANKS, LAYERS, WIDTH, SEQUENCE, BATCH, STEPS = 8, 8, 256, 64, 8, 4
MODEL = {
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": WIDTH // 8,
    "seq_length": SEQUENCE,
    "vocab_size": 260,  # the tokenizer has one less, as Qwen3's has fewer than its embedding has rows
}


def _cut_down(recipe: Any, layout: dict[str, int]) -> str:
    """Return a recipe of the chain with a small model and layout, serialised; everything else is the recipe's."""
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe

    for name, value in MODEL.items():
        setattr(recipe.model.config, name, value)
    for name, value in layout.items():
        setattr(recipe.trainer.strategy, name, value)
    recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.num_workers = SEQUENCE, BATCH, 0
    recipe.trainer.accelerator = "auto"  # the recipe's GPUs are not here
    recipe.trainer.max_steps = STEPS
    recipe.trainer.limit_val_batches, recipe.trainer.val_check_interval = 1, 2
    recipe.optim.config.lr, recipe.optim.lr_scheduler.warmup_steps = 1e-3, 1  # a loss that falls in a few steps
    recipe.log.ckpt.every_n_train_steps = 2
    return dump_recipe(recipe)


def _plan(folder: Path) -> RunPlan:
    from nemo_upcycle.recipes import qwen3_8b_e8t2
    from nemo_upcycle.recipes.h100_arguments import adjust

    sizes = {"hidden_size": WIDTH, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"vocab_size": 260, "head_dim": WIDTH // 8, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    parent = write_qwen3(folder / "parent", layers=LAYERS, **sizes)
    (folder / "evaluation.yaml").write_text(EVALUATION.replace("WINDOWS", "4") + "dtype: bfloat16\n")
    chain = qwen3_8b_e8t2.pipeline_recipe(num_nodes=1, num_gpus_per_node=RANKS)
    adjust(chain.pretrain, comm_overlap=False)  # NeMo's callback asks for the GPU
    pipeline = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}
    moe = _cut_down(chain.pretrain, pipeline | {"expert_model_parallel_size": 2})
    # NeMo's own layout of the dense model cuts sequences, which attention without a GPU cannot.
    dense_ct = _cut_down(chain.dense_ct, {"context_parallel_size": 1})
    blend, evaluation = write_texts(folder / "texts"), folder / "evaluation.yaml"
    return RunPlan("qwen3_8b_e8t2", str(write_tokenizer(parent)), str(blend), str(evaluation), moe, dense_ct)


def test_qwen3_8b_runs_from_import_to_report(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _plan(tmp_path).write(run_dir)
    run_stages(run_dir, ranks=RANKS)
    assert all(is_complete(run_dir / name) for name in ("hf", "upcycle/hf", "dense_ct/hf"))
    assert read_json(run_dir / "hf/config.json")["architectures"] == ["Qwen3MoeForCausalLM"]
    receipt = read_json(run_dir / "receipt.json")
    assert receipt["within_tolerance"] is True
    layout = read_json(run_dir / "pretrain/receipt.json")["layout"]
    assert (layout["tensor"], layout["pipeline"], layout["expert"]) == (2, 4, 2)
    steps = [json.loads(line) for line in (run_dir / "pretrain/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if "loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    evaluated = read_json(run_dir / "evaluation/trained.json")
    assert evaluated["settings"]["dtype"] == "bfloat16"
    assert "heldout_perplexity" in (run_dir / "report.md").read_text()
