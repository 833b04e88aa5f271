"""Bridge fine-tunes a model that was upcycled in Bridge, starting with the run's weights and vocabulary."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.cli.main import main
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.hf_model import load_model
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint
from tests.bridge.runs import SEQUENCE, SPEC, VOCABULARY, hooked, run_config, train_on_ranks
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize("style", ["provider", "builder"])
def test_finetuning_starts_with_the_runs_weights(dense: Path, tmp_path: Path, style: str) -> None:
    """Train with a learning rate of zero.

    Bridge's recipes would give the model the tokenizer's vocabulary, padded to 384 rows.
    """
    train_on_ranks(1, dense, tmp_path / "run", SPEC, style=style)
    run_ranks(_finetune, 1, dense, tmp_path / "sft", tmp_path / "run", process_group=False)
    before, after = (DistributedCheckpoint(tmp_path / name / "iter_0000001") for name in ("run", "sft"))
    names = [name for name in before.names() if not name.startswith("optimizer.")]
    assert "embedding.word_embeddings.weight" in names
    assert [name for name in names if not torch.equal(before.read(name), after.read(name))] == []


def test_upcycling_inside_finetune_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="names no checkpoint, and Bridge's finetune needs a checkpoint"):
        run_ranks(_finetune, 1, dense, tmp_path / "run", None, process_group=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_not_upcycled_is_refused(dense: Path, tmp_path: Path) -> None:
    from nemo_upcycle.trainers.bridge.finetuning import finetune_from

    with pytest.raises(UpcycleError, match=r"has no receipt\.json"):
        finetune_from(run_config(dense, tmp_path / "sft", None), dense)


def test_lora_adapters_train_resume_and_are_exported(dense: Path, tmp_path: Path) -> None:
    """The exported model has the loss that Bridge reports for the step after the checkpoint."""
    train_on_ranks(1, dense, tmp_path / "run", SPEC)
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        for stop in stops:
            run_ranks(_finetune, 1, dense, tmp_path / name, tmp_path / "run", True, stop, process_group=False)
    checkpoints = [DistributedCheckpoint(tmp_path / name / "iter_0000005") for name in ("whole", "parts")]
    trained = [name for name in checkpoints[0].names() if not name.startswith("optimizer.")]
    assert trained
    assert all(".adapter." in name for name in trained)
    assert [name for name in trained if not torch.equal(*(one.read(name) for one in checkpoints))] == []
    assert all(checkpoints[0].read(name).abs().max() > 0 for name in trained)
    assert main(["export", str(tmp_path / "whole/iter_0000004"), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    lines = (tmp_path / "whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    samples = [_Windows()[number] for number in range(16, 20)]
    tokens, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
    with torch.no_grad():
        logits = load_model(tmp_path / "hf", dtype=torch.float32).eval()(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert losses[4] == pytest.approx(float(loss), abs=1e-5)


class _Windows(torch.utils.data.Dataset[Any]):
    """Sequences of random tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=generator)
        places = torch.arange(SEQUENCE)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(SEQUENCE), "position_ids": places}


def _windows() -> Any:
    """Return a data provider for Bridge that gives `_Windows`."""
    from megatron.bridge.data.base import DatasetProvider

    @dataclass(kw_only=True)
    class Windows(DatasetProvider):
        seq_length: int
        dataloader_type: Any = "single"

        def build_datasets(self, context: Any) -> tuple[Any, None, None]:
            return _Windows(), None, None

    return Windows(seq_length=SEQUENCE, num_workers=0, pin_memory=False)


def _finetune(
    dense: Path, folder: Path, run: Path | None, adapters: bool = False, exit_interval: int | None = None
) -> None:
    """Run Bridge's finetune; if there is no run to start from, use a configuration with the upcycling hook."""
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.gpt_step import forward_step

    from nemo_upcycle.trainers.bridge.callbacks import upcycle_callbacks
    from nemo_upcycle.trainers.bridge.finetuning import finetune_from

    if run is None:
        finetune(hooked(dense, folder, SPEC), forward_step)
        return
    config = run_config(dense, folder, None, **({"steps": 5, "lr": 1e-2} if adapters else {}))
    config.tokenizer.use_tokenizer_vocab_size = True
    if adapters:
        config.dataset, config.peft = _windows(), LoRA(dim=4, alpha=8)
        config.train.exit_interval, config.checkpoint.save_interval = exit_interval, 2
    finetune_from(config, run, bf16=False, params_dtype=torch.float32, pipeline_dtype=torch.float32)
    with suppress(SystemExit):  # raised if training exits early
        finetune(config, forward_step, callbacks=upcycle_callbacks(config, folder))
