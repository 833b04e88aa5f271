"""Parents whose MoE hardly a Hugging Face class holds, trained by a stock recipe: what was saved computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.trainers.base import last_checkpoint
from tests.blends import write_blend
from tests.distributed.ranks import run_ranks
from tests.functional.tiny import texts
from tests.models import hugging_face_logits, sample_tokens, write_exaone4, write_smollm3, write_tokenizer
from tests.parents import write_gemma, write_granite, write_olmo3
from tests.tiers import quick


pytestmark = pytest.mark.slow
WRITERS: dict[str, Callable[..., Path]] = {
    "OLMo 3": write_olmo3,
    "EXAONE 4": write_exaone4,
    "SmolLM3": write_smollm3,
    "Granite 3": write_granite,
    "Gemma": write_gemma,
}


def _model(parent: str) -> Any:
    """Return NeMo's model of a parent: its own Gemma, and what this package makes of the others."""
    import nemo_run as run
    from nemo.collections import llm

    from nemo_upcycle.models.hf_config import read_architecture
    from nemo_upcycle.models.megatron_config import megatron_fields
    from nemo_upcycle.trainers.nemo.decoder import decoder_model

    arch = read_architecture(Path(parent))
    if not arch.scaled_embedding:
        return decoder_model(parent, seq_length=64)
    config = run.Config(
        llm.GemmaConfig, **megatron_fields(arch), vocab_size=arch.vocab_size, rotary_base=arch.rope_theta
    )
    config.seq_length = 64
    return run.Config(llm.GemmaModel, config=config)


def _train(parent: str, data: str, folder: str) -> None:
    """Train at a rate that moves no weight, so that the parent's function stays."""
    import fiddle as fdl
    from nemo.collections import llm

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.recipes import upcycled
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from tests.functional.stock import SPEC, cut_training

    use_cpu_backend()
    recipe = llm.qwen3_600m.pretrain_recipe()
    recipe.model = _model(parent)
    recipe = upcycled(cut_training(recipe), parent, SPEC, data)
    recipe.optim.config.lr = recipe.optim.lr_scheduler.min_lr = 1e-30
    recipe.optim.config.weight_decay = 0.0
    recipe.log.explicit_log_dir = folder
    recipe.log.ckpt.every_n_train_steps, recipe.log.ckpt.train_time_interval = 3, None
    check_recipe(recipe)
    fdl.build(recipe)()


def _logits(checkpoint: str, parent: str) -> torch.Tensor:
    from nemo_upcycle.evaluation.megatron.chunks import layout_here, load_chunks
    from nemo_upcycle.trainers.equivalence import megatron_logits

    (chunk,), _ = load_chunks(Path(checkpoint), Path(parent), None, layout_here(), torch.float32)
    with torch.no_grad():
        return megatron_logits(chunk, sample_tokens(259))


@pytest.mark.parametrize("name", quick([(one,) for one in WRITERS], ("EXAONE 4",)))
def test_a_saved_run_is_evaluated_as_the_model_that_was_trained(tmp_path: Path, name: str) -> None:
    parent = write_tokenizer(WRITERS[name](tmp_path / "parent", vocab_size=259))
    write_blend(tmp_path / "blend", parent, texts=texts())
    run = tmp_path / "run"
    run_ranks(_train, 1, str(parent), str(tmp_path / "blend"), str(run), process_group=False, timeout_s=600)
    got: Any = run_ranks(_logits, 1, str(last_checkpoint(run)), str(parent))[0]
    wanted = hugging_face_logits(parent, sample_tokens(259))
    assert float((got[..., :259] - wanted).norm() / wanted.norm()) <= 2e-6
