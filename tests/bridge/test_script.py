"""The script of docs/bridge.md trains one of Bridge's recipes, resumes under another layout, and can be exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import SPEC, VOCABULARY, as_builder, differences, export, offline
from tests.distributed.ranks import run_ranks
from tests.models import write_llama


#: Settings for a small run on a CPU, added to the settings of the script.
SMALL = """
mixed_precision=null {0}.bf16=false {0}.params_dtype=torch.float32 {0}.pipeline_dtype=torch.float32
dataset.seq_length=32 dataset.num_workers=0 model.seq_length=32 train.global_batch_size=4 validation.eval_iters=0
optimizer.lr=0 optimizer.min_lr=0 scheduler.lr_warmup_iters=0 checkpoint.save_interval=100 logger.tensorboard_dir=null
ddp.overlap_grad_reduce=false ddp.overlap_param_gather=false
"""


def _script(form: str, dense: str, folder: str, settings: list[str]) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.llama.h100.llama3 import llama32_1b_pretrain_1gpu_h100_bf16_config
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from nemo_upcycle.bridge import with_upcycling

    of_folder = AutoBridge.from_hf_pretrained
    AutoBridge.from_hf_pretrained = lambda name, **options: of_folder(dense, **options)  # instead of asking the hub
    config = llama32_1b_pretrain_1gpu_h100_bf16_config()
    if form == "builder":
        config.model = as_builder(config.model)
    config = with_upcycling(config, hf_model_path=dense, num_experts=4, top_k=3)
    config.model.expert_model_parallel_size = 2
    config.checkpoint.save = config.checkpoint.load = folder
    model = "model.transformer" if hasattr(config.model, "transformer") else "model"
    typed = [*SMALL.format(model).split(), *(word.replace("model.", f"{model}.", 1) for word in settings)]
    config = process_config_with_overrides(config, cli_overrides=["upcycling.top_k=2", *typed])
    pretrain(config, forward_step)


@pytest.mark.parametrize("form", ["provider", "builder"])
def test_the_script_trains_resumes_under_another_layout_and_exports(tmp_path: Path, form: str) -> None:
    dense = write_llama(tmp_path / "dense", tied=True, vocab_size=VOCABULARY)
    run = tmp_path / "run"
    for steps, layout in (
        (1, []),
        (2, ["model.expert_model_parallel_size=1", "model.pipeline_model_parallel_size=2"]),
    ):
        typed = [f"train.train_iters={steps}", *layout]
        run_ranks(_script, 2, form, str(dense), str(run), typed, process_group=False)
    assert (run / "iter_0000002").is_dir()
    assert read_json(run / "receipt.json")["spec"] == SPEC
    assert differences(export(dense, run, tmp_path / "hf"), offline(dense, tmp_path / "offline", SPEC)) == []
