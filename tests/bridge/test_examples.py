"""`examples/bridge_run.py` as a user runs it, on a small parent."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.utils.files import read_json
from tests.distributed.ranks import run_ranks
from tests.functional.tiny import write_parent
from tests.functional.typed import type_commands


SCRIPT = Path(__file__).parents[2] / "examples/bridge_run.py"
SETTINGS = """
model.expert_model_parallel_size=2 train.train_iters=1 train.global_batch_size=2 validation.eval_iters=0
scheduler.lr_warmup_iters=0 dataset.num_workers=0 logger.tensorboard_dir=null
"""


def test_bridge_run_trains_the_upcycled_model(tmp_path: Path) -> None:
    dense, run = write_parent(tmp_path / "dense"), tmp_path / "run"
    command = [str(SCRIPT), str(dense), str(run), *SETTINGS.split()]
    answers = run_ranks(type_commands, 2, [command], str(tmp_path), str(dense), process_group=False)
    for (answer,) in answers:
        assert answer.status == 0, answer.text
    assert newest_checkpoint(run) == run / "iter_0000001"
    receipt = read_json(run / "receipt.json")
    assert (receipt["ranks"], receipt["spec"]["num_experts"]) == (2, 8)
