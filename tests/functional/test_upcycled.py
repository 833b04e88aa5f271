"""NeMo's stock recipes, upcycled: real trainings at toy width, with NeMo's command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.trainers.base import last_checkpoint
from tests.blends import write_blend
from tests.contract.trainers import losses
from tests.distributed.ranks import run_ranks
from tests.functional.test_examples import ROTARY
from tests.functional.tiny import LAYERS, texts
from tests.functional.typed import type_commands
from tests.gpu.one_card import Sizes, prepare, train
from tests.models import hugging_face_logits, sample_tokens, write_exaone4, write_llama, write_smollm3, write_tokenizer
from tests.parents import write_gemma
from tests.tiers import quick


pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small parent with the constants of Llama 3.2, and its tokenised texts."""
    folder = tmp_path_factory.mktemp("inputs")
    llama = write_tokenizer(write_llama(folder / "llama", **ROTARY, tied=True, vocab_size=259, layers=LAYERS))
    write_blend(folder / "blend", llama, texts=texts())
    return folder


def test_a_stock_llama_recipe_trains_by_nemos_own_command(inputs: Path) -> None:
    factory = "tests.functional.stock.llama(parent='INPUTS/llama',dir='INPUTS/runs',data='INPUTS/blend')"
    command = f"llm pretrain --factory {factory}".replace("INPUTS", str(inputs)).split()
    commands = [[*command, *words, "--yes"] for words in (["optim.config.lr=-1"], ["model.config.num_layers=3"], [])]
    (answers,) = run_ranks(type_commands, 1, commands, str(inputs), str(inputs), process_group=False, timeout_s=600)
    refused, wrong_size, done = answers
    assert refused.status == 2, refused.text
    assert "  optim.config.lr is -1" in refused.text
    assert wrong_size.status == 2, wrong_size.text
    assert "model.config.num_layers is 3; expected 4" in wrong_size.text
    assert refused.written == wrong_size.written == []
    assert done.status == 0, done.text
    assert "model.config.num_moe_experts: None -> 8" in done.text
    (receipt,) = (inputs / "runs").rglob("receipt.json")
    assert json.loads(receipt.read_text())["exact"] is True
    assert len(losses(receipt.parent)) == 3


#: Parents whose MoE hardly any Hugging Face class can represent.
WRITERS: dict[str, Callable[..., Path]] = {"EXAONE 4": write_exaone4, "SmolLM3": write_smollm3, "Gemma": write_gemma}


def _train_still(parent: str, data: str, folder: str) -> None:
    """Train at a learning rate that moves no weight, so that the model keeps the parent's function."""
    import fiddle as fdl

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from tests.functional.stock import SPEC, made_from

    use_cpu_backend()
    recipe = made_from(parent, SPEC, lr=1e-30, data=data)
    recipe.optim.config.weight_decay, recipe.log.explicit_log_dir = 0.0, folder
    fdl.build(recipe)()


def _logits(checkpoint: str, parent: str) -> torch.Tensor:
    from nemo_upcycle.evaluation.megatron.chunks import layout_here, load_chunks
    from nemo_upcycle.trainers.equivalence import megatron_logits

    (chunk,), _ = load_chunks(Path(checkpoint), Path(parent), None, layout_here(), torch.float32)
    with torch.no_grad():
        return megatron_logits(chunk, sample_tokens(259))


@pytest.mark.parametrize("name", quick([(one,) for one in WRITERS], ("EXAONE 4",)))
def test_evaluates_a_saved_run_as_the_trained_model(tmp_path: Path, name: str) -> None:
    parent = write_tokenizer(WRITERS[name](tmp_path / "parent", vocab_size=259))
    write_blend(tmp_path / "blend", parent, texts=texts())
    run = tmp_path / "run"
    run_ranks(_train_still, 1, str(parent), str(tmp_path / "blend"), str(run), process_group=False, timeout_s=600)
    got: Any = run_ranks(_logits, 1, str(last_checkpoint(run)), str(parent))[0]
    wanted = hugging_face_logits(parent, sample_tokens(259))
    assert float((got[..., :259] - wanted).norm() / wanted.norm()) <= 2e-6


#: Sizes for the recipe for H100s, here without Transformer Engine. `tests/gpu` makes the same run on a card.
SMALL = Sizes(hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, padded_vocab=512, sequence=64, steps=4)


def test_llama3_8b_e8t2_trains_on_one_rank(tmp_path: Path) -> None:
    lines = train(SMALL, *prepare(tmp_path, SMALL), tmp_path / "run", "bf16")
    losses = [line["loss"] for line in lines]
    assert len(losses) == SMALL.steps
    assert losses[-1] < losses[0]
    assert len(lines[0]["expert_load"]) == SMALL.layers
    assert (tmp_path / "run" / "receipt.json").is_file()
