"""Your own recipes, in a folder outside the clone: a training, its dense baseline, and the chain around both.

    cd examples/own_recipe && export PYTHONPATH=.
    nemo llm pretrain --factory "my_recipes.llama32(dense='/models/Llama-3.2-1B', num_nodes=2)" --dryrun
    nemo upcycle pipeline --factory "my_recipes.chain(dense='/models/Llama-3.2-1B')" data=/data/mine --dryrun

The decorators also register the factories under short names. NeMo-Run knows these names only after it has imported the
module. NeMo-Run imports a file `workspace.py` in the current folder by itself. If your recipes are in this file,
`--factory my_llama32` is enough.
"""

from typing import Optional  # NeMo-Run uses these annotations to parse a command line

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.recipes import checkpoints, pipeline, start_from, upcycled


# isort: split
import nemo_run as run
from nemo.collections import llm


SPEC = UpcycleSpec(num_experts=8, top_k=2)
DENSE = "hf://meta-llama/Llama-3.2-1B"


def _dense_recipe(name: str, dir: Optional[str], num_nodes: int) -> run.Partial:
    """Return NeMo's recipe with the settings that both trainings share: schedule, batch, checkpoints."""
    recipe = llm.llama32_1b.pretrain_recipe(dir=dir, name=name, num_nodes=num_nodes)
    recipe.trainer.max_steps, recipe.data.global_batch_size = 10_000, 256
    recipe.optim.config.lr, recipe.optim.lr_scheduler.min_lr = 3e-5, 3e-7
    recipe.optim.lr_scheduler.warmup_steps = 100
    recipe.log.ckpt = checkpoints(1000, keep_last=2)
    return recipe


@run.cli.factory(target=llm.pretrain, name="my_llama32")
def llama32(
    dense: str = DENSE, dir: Optional[str] = None, num_nodes: int = 1, data: Optional[str] = None
) -> run.Partial:
    """Create the training of the upcycled model, with its experts spread over the GPUs of a node."""
    recipe = upcycled(_dense_recipe("my_llama32", dir, num_nodes), dense, SPEC, data)
    recipe.trainer.strategy.expert_model_parallel_size = 8
    return recipe


@run.cli.factory(target=llm.pretrain, name="my_llama32_dense_ct")
def llama32_dense_ct(
    dense: str = DENSE, dir: Optional[str] = None, num_nodes: int = 1, data: Optional[str] = None
) -> run.Partial:
    """Create the dense baseline: the parent, trained further in the same way as the upcycled model."""
    return start_from(_dense_recipe("my_llama32_dense_ct", dir, num_nodes), dense, None, data)


@run.cli.factory(target=pipeline, name="my_llama32")
def chain(dense: str = DENSE, dir: str = "runs/my_llama32", num_nodes: int = 1) -> run.Partial:
    """Create the chain of both trainings; set your `data=` and `evaluation=` on the command line."""
    moe, baseline = llama32(dense, num_nodes=num_nodes), llama32_dense_ct(dense, num_nodes=num_nodes)
    return run.Partial(pipeline, dir=dir, dense=dense, pretrain=moe, dense_ct=baseline)
