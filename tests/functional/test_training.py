"""Promises that only NeMo's recipe makes: validations, a full disk, trials, data order, checkpoints for plain NeMo."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.sources.checkpoints import steps_in
from nemo_upcycle.trainers.base import last_checkpoint
from tests.blends import write_blend
from tests.functional.runs import Runs
from tests.functional.tiny import BATCH, PADDED_VOCAB
from tests.waiting import HANG_S


pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> list[dict[str, Any]]:
    """The metrics of six steps on one rank, with a checkpoint every second step."""
    return runs.train("alone", 1, steps=6, every=2)


def test_validation_begins_with_the_model_that_training_starts_from(runs: Runs, alone: list[dict[str, Any]]) -> None:
    """Metrics have step 0 once, even if a killed run starts afresh. The validation does not change the training."""
    options = {"steps": 6, "every": 4, "validate_every": 2}
    with pytest.raises(RuntimeError, match="rank 0 died"):
        runs.train("validated", 1, send={"step": 1, "ranks": [0], "number": int(signal.SIGKILL)}, **options)
    lines = runs.train("validated", 1, **options)
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4, 6]
    steps = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in steps] == [line["loss"] for line in alone]


def test_a_run_resumes_after_a_full_disk(runs: Runs, alone: list[dict[str, Any]]) -> None:
    """The disk has room for one checkpoint of 11 MiB, but not for two checkpoints."""
    disk = runs.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "disk", disk], check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        ((ending, kept),) = runs.endings("disk/run", 1, steps=6, every=2)
        whole = last_checkpoint(runs.folder / "disk/run")
        assert kept == steps_in(whole) == 2
        assert ending.startswith(f"The disk of {whole.parent} has 0 bytes free, beside ")
        assert f"resumes from {whole}" in ending
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        lines = runs.train("disk/run", 1, steps=6, every=2)
        assert [line["loss"] for line in lines] == [line["loss"] for line in alone]
        assert [path.name for path in whole.parent.iterdir()] == [last_checkpoint(runs.folder / "disk/run").name]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("options", [{"validate_every": 2000}, {}], ids=["a longer interval", "no validation"])
def test_a_trial_keeps_its_end_wherever_its_validations_fall(runs: Runs, options: dict[str, int]) -> None:
    """Alone, Lightning refuses a longer interval after building everything; NeMo saves no end without validations."""
    name = f"trial {len(options)}"
    lines = runs.train(name, 1, steps=3, every=2, **options)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert steps_in(last_checkpoint(runs.folder / name)) == 3


#: Sources that together have about as many tokens as ten sequences.
SOURCES = {"talks": (0.7, {"train": [10], "validation": [12]}), "books": (0.3, {"train": [6], "validation": [8]})}


def test_resumed_and_lengthened_run_reads_the_same_samples(runs: Runs, tmp_path: Path) -> None:
    """The first half ends within the first epoch. Without the package, Megatron would reorder both epochs."""
    blend = write_blend(tmp_path / "blend", runs.parent, SOURCES)

    def read(name: str, steps: int) -> list[str]:
        """Train to a step; return all samples of the run so far, rank by rank."""
        record = tmp_path / f"{name}.samples"
        options = {"every": 2, "validate_every": 2, "blend": str(blend), "record": {"path": str(record)}}
        lines = runs.train(name, 2, ep=2, steps=steps, **options)
        assert lines[-1]["step"] == steps
        return [line for rank in range(2) for line in Path(f"{record}.{rank}").read_text().splitlines()]

    whole = read("whole", 4)
    assert len(whole) == 4 * BATCH
    assert len(read("halves", 2)) == 2 * BATCH
    assert read("halves", 4) == whole
    settings = json.loads((runs.folder / "halves/training.json").read_text())
    assert settings["data"] == "blend tiny (blend)"


_PLAIN_NEMO = """
import sys
sys.modules["nemo_upcycle"] = None  # no import finds it
checkpoint = sys.argv[1]
import torch
from torch.utils import cpp_extension

def no_compiler(*args, **kwargs):
    raise RuntimeError

cpp_extension.load_inline = no_compiler  # with torch for CUDA and without a GPU, Megatron's import would break here
from megatron.core import dist_checkpointing, parallel_state
from nemo.collections.llm import LlamaModel
from nemo.collections.llm.gpt.model.base import local_layer_spec
from nemo.lightning.io import load_context

model = load_context(f"{checkpoint}/context", subpath="model")
assert type(model) is LlamaModel, type(model)
config = model.config
# What any NeMo user sets who has neither CUDA nor Transformer Engine; Megatron's own checkpoint code does the rest.
config.transformer_layer_spec, config.use_cpu_initialization = local_layer_spec, True
for name in ("persist_layer_norm", "masked_softmax_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion"):
    setattr(config, name, False)
config.moe_token_dispatcher_type = "allgather"  # the other one makes a CUDA stream
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
megatron = config.configure_model(model.tokenizer)
for parameter in megatron.parameters():
    parameter.data.fill_(float("nan"))
loaded = dist_checkpointing.load(megatron.sharded_state_dict(prefix="module."), f"{checkpoint}/weights")
weights = {name.removeprefix("module."): value for name, value in loaded.items() if name.startswith("module.")}
megatron.load_state_dict(weights)
assert all(parameter.isfinite().all() for parameter in megatron.parameters())
router = megatron.decoder.layers[3].mlp.router.weight
print("LOADED", sum(parameter.numel() for parameter in megatron.parameters()), float(router.double().sum()))
"""


def test_a_checkpoint_opens_in_plain_nemo(runs: Runs, alone: list[dict[str, Any]]) -> None:
    from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint

    checkpoint = last_checkpoint(runs.folder / "alone")
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_NEMO, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        cwd=runs.folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, parameters, router_sum = next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()
    receipt = json.loads((runs.folder / "alone/receipt.json").read_text())
    assert int(parameters) == receipt["total_params"] + (PADDED_VOCAB - 259) * 64
    router = DistributedCheckpoint(checkpoint / "weights").read("module.decoder.layers.mlp.router.weight")[3]
    assert float(router_sum) == pytest.approx(float(router.double().sum()), rel=1e-12)
