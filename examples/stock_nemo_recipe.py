"""Turn a stock NeMo recipe into a recipe that upcycles a dense checkpoint; change only the settings for experts.

    python examples/stock_nemo_recipe.py --factory "stock_llama32_e8t2(dense='/models/Llama-3.2-1B')" --dryrun
    torchrun --nproc-per-node 8 examples/stock_nemo_recipe.py --factory stock_llama32_e8t2 trainer.max_steps=100 --yes

NeMo-Run reads the words after the factory. They can be any setting of the recipe, `--dryrun`, `--yes` or
`run.executor=...`. The script prints its changes to NeMo's recipe. Instead of `llm.llama32_1b`, you can use any NeMo
recipe of a dense Llama, Mistral, Qwen2, Qwen3 or Gemma. A model that cannot be upcycled is refused with the reason.
"""

from typing import Optional  # NeMo-Run uses these annotations to parse a command line

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.recipes import upcycled


# isort: split
import nemo_run as run
from nemo.collections import llm


def stock_llama32_e8t2(
    dense: str = "hf://meta-llama/Llama-3.2-1B", dir: Optional[str] = None, data: Optional[str] = None
) -> run.Partial:
    """Create NeMo's training of Llama 3.2 1B on one node of eight GPUs, upcycled to 8 experts, top-2.

    Args:
        dense (str): The dense checkpoint: a Hugging Face folder, `hf://ORG/NAME` or `nemo:///absolute/path`.
        dir (str | None): Directory for saving logs and checkpoints.
        data (str | None): A finished folder of `nemo-upcycle data`; None means NeMo's mock data.

    Returns:
        run.Partial: Partial configuration for pretraining.
    """
    stock = llm.llama32_1b.pretrain_recipe(dir=dir, name="stock_llama32_e8t2", num_gpus_per_node=8)
    recipe = upcycled(stock, dense=dense, spec=UpcycleSpec(num_experts=8, top_k=2), data=data)
    recipe.trainer.strategy.expert_model_parallel_size = 8
    recipe.optim.config.lr = 3e-5  # NeMo's 3e-4 is meant for training from random weights
    return recipe


if __name__ == "__main__":
    run.cli.main(llm.pretrain)
