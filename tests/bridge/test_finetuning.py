"""What was upcycled in Bridge is fine-tuned by Bridge: it starts with the run's weights and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint
from tests.bridge.runs import VOCABULARY, run_config, train
from tests.distributed.ranks import run_ranks
from tests.models import write_llama


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SPEC: dict[str, Any] = {"num_experts": 4, "top_k": 2}


@pytest.mark.parametrize("style", ["provider", "builder"])
def test_finetuning_starts_with_the_weights_and_the_vocabulary_of_the_run(tmp_path: Path, style: str) -> None:
    """Its learning rate is zero, and Bridge's recipes would give it the tokenizer's vocabulary, padded to 384 rows."""
    dense = write_llama(tmp_path / "dense", tied=True, vocab_size=VOCABULARY)
    run_ranks(_train, 1, dense, tmp_path / "run", style, process_group=False)
    run_ranks(_finetune, 1, dense, tmp_path / "run", tmp_path / "sft", process_group=False)
    before, after = (DistributedCheckpoint(tmp_path / name / "iter_0000001") for name in ("run", "sft"))
    names = [name for name in before.names() if not name.startswith("optimizer.")]
    assert "embedding.word_embeddings.weight" in names
    assert [name for name in names if not torch.equal(before.read(name), after.read(name))] == []


def test_upcycling_inside_finetune_is_refused(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense", tied=True, vocab_size=VOCABULARY)
    with pytest.raises(RuntimeError, match="finetune starts from a checkpoint, upcycling makes the first"):
        run_ranks(_upcycle_in_finetune, 1, dense, tmp_path / "run", process_group=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_not_upcycled_is_refused(tmp_path: Path) -> None:
    from nemo_upcycle.trainers.bridge.finetuning import finetune_from

    dense = write_llama(tmp_path / "dense", tied=True, vocab_size=VOCABULARY)
    with pytest.raises(UpcycleError, match=r"got no receipt\.json"):
        finetune_from(run_config(dense, tmp_path / "sft", None), dense)


def _train(dense: Path, run: Path, style: str) -> None:
    train(dense, run, SPEC, style=style)


def _finetune(dense: Path, run: Path, folder: Path) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    from nemo_upcycle.trainers.bridge.finetuning import finetune_from

    config = run_config(dense, folder, None)
    config.tokenizer.use_tokenizer_vocab_size = True
    types = {"bf16": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    finetune_from(config, run, **types)
    finetune(config, forward_step)


def _upcycle_in_finetune(dense: Path, run: Path) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start

    spec = UpcycleSpec(**SPEC)
    config = run_config(dense, run, spec)
    upcycle_on_start(config, dense, spec)
    finetune(config, forward_step)
