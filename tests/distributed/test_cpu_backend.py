"""Stock NeMo training on gloo ranks: every layout gives the numbers of one rank."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.tiers import quick


CLIP = 0.5
LAYOUTS = [
    (2, {"tp": 2}),
    (2, {"pp": 2, "vp": 2}),  # two stages interleaved: two messages at a time between the same two ranks
    (2, {"ep": 2}),
    (2, {"ep": 2, "moe_token_dispatcher_type": "allgather"}),
    (2, {"distributed": True}),
    (4, {"ep": 4, "distributed": True}),
    (4, {"tp": 2, "ep": 4, "etp": 1}),
    (8, {"tp": 2, "pp": 2, "ep": 2, "distributed": True}),  # uneven numbers of tokens on the tensor-parallel ranks
]

BIASES = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
}


class _Tokenizer:
    vocab_size, eod, eos_id = 256, 0, 0
    unique_identifiers = {"name": "bytes"}  # noqa: RUF012


def _write_tokens(prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    numbers = np.random.default_rng(0)
    for _ in range(64):
        builder.add_item(torch.from_numpy(numbers.integers(0, 250, 33).astype("int32")))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def _model(fields: dict[str, Any]) -> Any:
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.llama import Llama3Config

    sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96}
    heads = {"num_attention_heads": 4, "num_query_groups": 2}
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 96, "moe_aux_loss_coeff": 0.01}
    rest = {"seq_length": 32, "vocab_size": 256, "moe_token_dispatcher_type": "alltoall"}
    return llm.LlamaModel(Llama3Config(**(sizes | heads | experts | rest | fields)))


class Recorder(pl.Callback):
    """Keeps the loss, the gradients' norm before clipping, and the norm of what this rank's optimizer then saw."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        shown = trainer.callback_metrics
        optimizer = trainer.strategy.optimizers[0].mcore_optimizer
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        grads = [p.grad for part in parts for p in part.get_parameters() if p.grad is not None]
        seen = float(torch.stack([grad.pow(2).sum() for grad in grads]).sum().sqrt())
        self.rows.append((float(shown["reduced_train_loss"]), float(shown["grad_norm"]), seen))


def _train(
    folder: str, *, steps: int, tp: int = 1, pp: int = 1, vp: int | None = None, ep: int = 1, etp: int | None = None,
    distributed: bool = False, save: str = "", restore: str = "", **fields: Any,
) -> list[tuple[float, float, float]]:  # fmt: skip
    import nemo.lightning as nl
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm
    from nemo.utils import logging

    from nemo_upcycle.cpu.backend import use_cpu_backend

    logging.set_verbosity(logging.ERROR)
    use_cpu_backend()
    recorder = Recorder()
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        max_steps=steps,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            sequence_parallel=tp > 1,
            ckpt_async_save=False,
        ),
        plugins=nl.MegatronMixedPrecision(precision="32", params_dtype=torch.float32),
        callbacks=[recorder],
        limit_val_batches=0,
        logger=False,
    )
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=CLIP, use_distributed_optimizer=distributed)
    data = llm.PreTrainingDataModule(
        paths=[f"{folder}/tokens"], seq_length=32, micro_batch_size=1, global_batch_size=8, num_workers=0,
        tokenizer=_Tokenizer(), split="90,5,5",
    )  # fmt: skip
    checkpoint = nl.ModelCheckpoint(
        monitor="reduced_train_loss", save_last=False, save_top_k=1 if save else 0, every_n_train_steps=steps,
        save_optim_on_train_end=True, filename="model",
    )  # fmt: skip
    start = nl.RestoreConfig(path=restore, load_optim_state=False, load_artifacts=False) if restore else None
    llm.train(
        _model(fields),
        data,
        trainer,
        optim=nl.MegatronOptimizerModule(config=settings),
        log=nl.NeMoLogger(log_dir=save or f"{folder}/log", name="run", use_datetime_version=False, ckpt=checkpoint),
        resume=nl.AutoResume(restore_config=start),
        tokenizer="data",
    )
    return recorder.rows


def train(folder: Path, world_size: int, **options: Any) -> list[list[tuple[float, float, float]]]:
    """Train on `world_size` ranks; return for each rank, for each step, loss, norm before and norm after clipping."""
    return run_ranks(partial(_train, str(folder), **options), world_size, process_group=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cpu")
    _write_tokens(path / "tokens")
    train(path, 1, steps=2, save=str(path / "start"))
    return path


@pytest.fixture(scope="module")
def start(folder: Path) -> str:
    return str(folder / "start/run/checkpoints/model")


@pytest.fixture(scope="module")
def alone(folder: Path, start: str) -> list[tuple[float, float, float]]:
    """What one rank does in two steps from the checkpoint at which all layouts start."""
    return train(folder, 1, steps=2, restore=start)[0]


@pytest.mark.parametrize(
    ("world_size", "layout"), quick(LAYOUTS, (2, {"tp": 2}), (2, {"ep": 2})), ids=lambda value: str(value)
)
def test_every_layout_trains_as_one_rank(
    folder: Path, start: str, alone: list[tuple[float, float, float]], world_size: int, layout: dict[str, Any]
) -> None:
    last_stage = train(folder, world_size, steps=2, restore=start, **layout)[-1]
    for got, expected in zip(last_stage, alone, strict=True):
        assert got[:2] == pytest.approx(expected[:2], rel=1e-5)


def test_biases_that_balance_experts_move(folder: Path) -> None:
    moved, fixed = (train(folder, 1, steps=3, **BIASES, moe_router_bias_update_rate=rate)[0] for rate in (0.1, 0))
    assert moved[0] == fixed[0]
    assert abs(moved[2][0] - fixed[2][0]) > 1e-4


@pytest.mark.parametrize(("world_size", "distributed"), quick([(1, False), (2, True)], (1, False)))
def test_clipping_scales_the_gradients_to_the_limit(
    folder: Path, start: str, world_size: int, distributed: bool
) -> None:
    rows = [rank[0] for rank in train(folder, world_size, steps=1, restore=start, distributed=distributed)]
    assert rows[0][1] > 2 * CLIP
    assert sum(row[2] ** 2 for row in rows) ** 0.5 == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.full
def test_dropout_is_repeated_by_recomputation(
    folder: Path, start: str, alone: list[tuple[float, float, float]]
) -> None:
    options = {"steps": 2, "restore": start, "tp": 2, "hidden_dropout": 0.2, "attention_dropout": 0.2}
    plain = train(folder, 2, **options)[0]
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert train(folder, 2, **options, **again)[0][1][:2] == pytest.approx(plain[1][:2], rel=1e-6)
    assert abs(plain[0][0] - alone[0][0]) > 1e-3


def _draws() -> dict[str, list[float]]:
    """Draw inside and outside Megatron's random states on two tensor- and expert-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(5)
    random.model_parallel_cuda_manual_seed(5)
    tracker = random.get_cuda_rng_tracker()
    outside = torch.rand(2).tolist()
    torch.manual_seed(5)
    drawn: dict[str, list[float]] = {"outside": outside}
    for name in ("model", "model_again", "data", "expert"):
        with tracker.fork(f"{name.split('_')[0]}-parallel-rng"):
            drawn[name] = torch.rand(3).tolist()
    drawn["outside_after"] = torch.rand(2).tolist()
    return drawn


def test_random_states_differ_only_where_they_should() -> None:
    first, second = run_ranks(_draws, 2)
    assert first["outside"] == first["outside_after"] == second["outside"] == second["outside_after"]
    assert first["data"] == second["data"]
    assert first["model"] != second["model"]
    assert first["expert"] != second["expert"]
    assert first["model"] != first["model_again"]
