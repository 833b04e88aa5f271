"""Train two layers of Llama 3 8B at full width, with 8 experts, top-2, by the real recipe on one card.

    python -m tests.gpu.one_card DENSE DATA FOLDER PRECISION

This command makes one run in its own process, so that runs in other precisions do not share the card's memory with it.
Weights, gradients and optimizer states need 18 bytes for each of 3.1B parameters, so the run fits into 80 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.blends import write_blend
from tests.functional.tiny import texts
from tests.models import write_random, write_tokenizer


#: Precision by the planner's name -> the recipe's `fp8_recipe`.
PRECISIONS = {"bf16": None, "fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}
CAPACITY_FACTOR = 4.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of the trained model: by default Llama 3 8B's width, with fewer layers and a smaller vocabulary."""

    layers: int = 2
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    padded_vocab: int = 32768
    sequence: int = 4096
    batch: int = 4
    steps: int = 12

    def hf_config(self) -> dict[str, Any]:
        """Return the parent's `config.json`; its vocabulary is the 259 tokens of `write_tokenizer`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": 259,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        }


def prepare(folder: Path, sizes: Sizes) -> tuple[Path, Path]:
    """Write a random parent and texts of its tokens; return their folders."""
    dense = write_tokenizer(write_random(folder / "dense", sizes.hf_config()))
    split = {name: documents for name, documents in texts(2 * sizes.sequence).items() if name != "heldout"}
    return dense, write_blend(folder / "data", dense, texts=split)


def cut_down(config: Any, sizes: Sizes) -> None:
    """Set the sizes in the configuration of a NeMo model, in place."""
    fields = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.kv_heads,
        "kv_channels": sizes.head_dim,
        "seq_length": sizes.sequence,
        "make_vocab_size_divisible_by": sizes.padded_vocab,
    }
    for name, value in fields.items():
        setattr(config, name, value)


def recipe_for(sizes: Sizes, dense: Path, data: Path, folder: Path, precision: str) -> Any:
    """Return the recipe of Llama 3 8B, shrunk to one card, with the same kernels, data and optimizer settings.

    A precision that ends with "+params" also keeps its parameters in FP8.
    """
    import nemo_run as run

    from nemo_upcycle.data.blend_module import blend_data
    from nemo_upcycle.recipes import llama3_8b_e8t2
    from nemo_upcycle.trainers.nemo.recipes import place_recipe

    recipe = llama3_8b_e8t2.pretrain_recipe(
        num_nodes=1,
        num_gpus_per_node=1,
        fp8_recipe=PRECISIONS[precision.removesuffix("+params")],
        capacity_factor=CAPACITY_FACTOR,
        recompute_moe_steps=0,
        comm_overlap=False,
        tensor_parallelism=1,
        pipeline_parallelism=1,
        virtual_pipeline_parallelism=1,
        expert_parallelism=1,
    )
    if precision.endswith("+params"):
        recipe.trainer.plugins.fp8_param_gather = True
    cut_down(recipe.model.config, sizes)
    recipe.data = run.Config(
        blend_data, dense=str(dense), seq_length=sizes.sequence, global_batch_size=sizes.batch, micro_batch_size=1
    )
    recipe.trainer.accelerator = "auto"  # without a GPU, the same code trains with the local modules
    recipe.trainer.max_steps = sizes.steps
    recipe.trainer.limit_val_batches, recipe.trainer.val_check_interval = 0, 1
    recipe.optim.config.lr = 1e-4
    recipe.optim.lr_scheduler.warmup_steps = 1
    recipe.log.ckpt.save_last = False
    recipe.log.ckpt.save_optim_on_train_end = False
    place_recipe(recipe, folder, dense, data)
    return recipe


def planned_gib(sizes: Sizes, precision: str) -> dict[str, float]:
    """Return the planned memory (GiB) of the card's allocator for each term, without the driver's own memory."""
    from nemo_upcycle.models.hf_config import architecture_from_config
    from nemo_upcycle.planning.layout import Layout
    from nemo_upcycle.planning.memory import stage_memory
    from nemo_upcycle.planning.workload import Workload
    from nemo_upcycle.recipes.llama3_8b import SPEC

    dense = architecture_from_config(sizes.hf_config())
    arch = replace(dense, vocab_size=sizes.padded_vocab).upcycled(SPEC)
    work = Workload(
        seq_length=sizes.sequence, global_batch=sizes.batch, capacity_factor=CAPACITY_FACTOR, precision=precision
    )
    return replace(stage_memory(arch, Layout(gpus=1), work, 0), context=0).gib()


def train(sizes: Sizes, dense: Path, data: Path, folder: Path, precision: str) -> list[dict[str, Any]]:
    """Train in a separate process, and return the lines of its metrics.

    Raises:
        RuntimeError: Training failed; the message ends with the output of the process.
    """
    command = [sys.executable, "-m", "tests.gpu.one_card", str(dense), str(data), str(folder), precision]
    done = subprocess.run([*command, json.dumps(asdict(sizes))], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training in {precision} ended with status {done.returncode}\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main(arguments: list[str]) -> None:
    """Train once."""
    import fiddle as fdl

    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    dense, data, folder, precision, sizes = arguments
    fdl.build(recipe_for(Sizes(**json.loads(sizes)), Path(dense), Path(data), Path(folder), precision))()


if __name__ == "__main__":
    main(sys.argv[1:])
