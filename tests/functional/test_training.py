"""The recipe itself, on real ranks: layouts start at the same loss, runs resume, checkpoints are plain NeMo's."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from nemo_upcycle.sources.checkpoints import steps_in
from tests.functional.runs import Runs
from tests.functional.tiny import BATCH, EXPERTS, LAYERS, PADDED_VOCAB, SEQUENCE
from tests.tiers import quick
from tests.waiting import HANG_S


pytestmark = pytest.mark.slow
LAYOUTS = [
    (2, {"ep": 2}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (8, {"tp": 2, "pp": 2, "ep": 2}),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> list[dict[str, Any]]:
    """What one rank does in six steps, with a checkpoint every second step."""
    return runs.train("alone", 1, steps=6, every=2)


def test_every_step_has_a_complete_line(runs: Runs, alone: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in alone] == [1, 2, 3, 4, 5, 6]
    for line in alone:
        assert set(line) == {
            *("step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_s", "tokens_per_s_per_gpu"),
            *("tflops_per_gpu", "memory_gib", "expert_load", "router"),
        }
        assert line["tokens"] == line["step"] * BATCH * SEQUENCE
        assert line["tokens_per_s"] == pytest.approx(BATCH * SEQUENCE / line["seconds"], rel=0.05)
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert len(line["expert_load"]) == LAYERS
        for shares in line["expert_load"]:
            assert len(shares) == EXPERTS
            assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.1


def test_training_json_holds_the_settings_that_act(runs: Runs, alone: list[dict[str, Any]]) -> None:
    settings = json.loads((runs.folder / "alone/training.json").read_text())
    flops = settings.pop("flops_per_token")
    assert flops["full"] > flops["causal"] > 0
    assert settings == {
        "card": "",
        "data": "blend tiny (data)",
        "max_steps": 6,
        "ranks": 1,
        "micro_batch_size": 1,
        "global_batch_size": BATCH,
        "seq_length": SEQUENCE,
        "precision": "32-true",
        "optimizer": "adam",
        "weight_decay": 0.1,
        "max_lr": 1e-3,
        "schedule": {"name": "CosineAnnealing", "warmup_steps": 2, "constant_steps": 0, "min_lr": 1e-5},
        "lr_factors": {"router": 1.0, "experts": 1.0, "warmup_steps": 0, "freezes": "experts"},
        "balancing": "aux_loss 0.01",
    }
    assert max(line["lr"] for line in alone) == pytest.approx(settings["max_lr"])


@pytest.mark.full
def test_validation_begins_with_the_model_that_training_starts_from(runs: Runs, alone: list[dict[str, Any]]) -> None:
    """Step 0 is in the metrics once, after a start from scratch over a killed run too; training does not notice."""
    with pytest.raises(RuntimeError, match="rank 0 died"):
        runs.train("validated", 1, steps=6, every=4, validate_every=2, kill=1)
    lines = runs.train("validated", 1, steps=6, every=4, validate_every=2)
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4, 6]
    steps = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in steps] == [line["loss"] for line in alone]


def test_a_full_disk_is_named_and_the_run_goes_on_with_more_room(runs: Runs, alone: list[dict[str, Any]]) -> None:
    """A checkpoint of 11 MiB fits, a second one beside it does not."""
    disk = runs.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "disk", disk], check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        ((ending, kept),) = runs.endings("disk/run", 1, steps=6, every=2)
        whole = runs.checkpoint("disk/run")
        assert kept == steps_in(whole) == 2
        assert ending.startswith(f"disk of {whole.parent}: got 0 bytes of room beside ")
        assert f"goes on from {whole}, which is whole" in ending
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        lines = runs.train("disk/run", 1, steps=6, every=2)
        assert [line["loss"] for line in lines] == [line["loss"] for line in alone]
        assert [path.name for path in whole.parent.iterdir()] == [runs.checkpoint("disk/run").name]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_trial_shorter_than_its_interval_of_validations_trains_and_keeps_its_end(runs: Runs) -> None:
    """Lightning refused it once everything was built."""
    lines = runs.train("trial", 1, steps=3, every=2, validate_every=2000)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert steps_in(runs.checkpoint("trial")) == 3


@pytest.mark.full
def test_every_validation_sees_the_same_tokens(runs: Runs) -> None:
    lines = runs.train("standing", 1, steps=4, validate_every=2, frozen=True)
    first, *later = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert later == [first, first]


@pytest.mark.parametrize(("world_size", "layout"), quick(LAYOUTS, (2, {"tp": 2})), ids=lambda value: str(value))
def test_every_layout_starts_at_the_same_loss(
    runs: Runs, alone: list[dict[str, Any]], world_size: int, layout: dict[str, int]
) -> None:
    name = "-".join(f"{axis}{size}" for axis, size in layout.items())
    lines = runs.train(name, world_size, steps=2, **layout)
    assert [line["step"] for line in lines] == [1, 2]
    for got, expected in zip(lines, alone, strict=False):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert got["expert_load"] == [pytest.approx(shares, abs=5e-3) for shares in expected["expert_load"]]
    receipt = json.loads(runs.receipt(name).read_text())
    assert receipt["ranks"] == world_size
    assert receipt["bytes_read"] == receipt["bytes_needed"]
    assert (receipt["layout"]["tensor"], receipt["layout"]["expert"]) == (layout.get("tp", 1), layout.get("ep", 1))


def test_a_finished_run_is_not_upcycled_again(runs: Runs, alone: list[dict[str, Any]]) -> None:
    before = runs.receipt("alone").stat()
    assert runs.train("alone", 1, steps=6, every=2) == alone
    after = runs.receipt("alone").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_killed_run_resumes_from_its_last_checkpoint(runs: Runs, alone: list[dict[str, Any]]) -> None:
    """Killed after step 5, with the checkpoint of step 4 behind it: the same numbers as never stopped."""
    with pytest.raises(RuntimeError, match="rank 0 died"):
        runs.train("killed", 1, steps=6, every=2, kill=5)
    assert runs.metrics("killed")[-1]["step"] >= 4
    before = runs.receipt("killed").stat()
    lines = runs.train("killed", 1, steps=6, every=2)
    after = runs.receipt("killed").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for got, expected in zip(lines, alone, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    ("world_size", "layout"), [(2, {"ep": 2}), (4, {"tp": 2, "pp": 2})], ids=lambda value: str(value)
)
def test_a_checkpoint_loads_under_another_layout(
    runs: Runs, alone: list[dict[str, Any]], world_size: int, layout: dict[str, int]
) -> None:
    """Restored weights, trained for one step from the start of the data, on one rank and on several."""
    restore = str(runs.checkpoint("alone"))
    name = f"restored-{world_size}"
    (expected,) = runs.train(f"{name}-alone", 1, steps=1, restore=restore)
    (got,) = runs.train(name, world_size, steps=1, restore=restore, **layout)
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert got["loss"] < alone[0]["loss"] - 0.1  # trained, not upcycled anew
    assert not runs.receipt(name).exists()


_PLAIN_NEMO = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nemo_upcycle":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
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
assert not [name for name in sys.modules if name.startswith("nemo_upcycle")]
router = megatron.decoder.layers[3].mlp.router.weight
print("LOADED", sum(parameter.numel() for parameter in megatron.parameters()), float(router.double().sum()))
"""


@pytest.mark.full
def test_a_checkpoint_opens_in_plain_nemo(runs: Runs, alone: list[dict[str, Any]]) -> None:
    from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint

    checkpoint = runs.checkpoint("alone")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PLAIN_NEMO), str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        cwd=runs.folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, parameters, router_sum = next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()
    receipt = json.loads(runs.receipt("alone").read_text())
    assert int(parameters) == receipt["total_params"] + (PADDED_VOCAB - 259) * 64
    router = DistributedCheckpoint(checkpoint / "weights").read("module.decoder.layers.mlp.router.weight")[3]
    assert float(router_sum) == pytest.approx(float(router.double().sum()), rel=1e-12)
