"""Qwen3-0.6B upcycled to 8 experts, top-2: a Qwen3 for one GPU of 80 GB.

The few steps, the data and the schedule are those of `smollm2_135m_e8t2`.
"""

import lightning.pytorch as pl
import nemo_run as run

from nemo_upcycle.pipeline.nemo.pipeline import pipeline
from nemo_upcycle.recipes import qwen3_600m_dense_ct as dense_ct
from nemo_upcycle.recipes.common import change_model, moe_settings
from nemo_upcycle.recipes.smollm2_135m_e8t2 import SPEC, trainer, upcycled_recipe


__all__ = ["NAME", "SPEC", "model", "pipeline_recipe", "pretrain_recipe", "trainer"]

NAME = "qwen3_600m_e8t2"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Qwen3-0.6B configuration: 2.446B parameters, 0.861B active.

    Returns:
        run.Config[pl.LightningModule]: the dense model's own configuration with its MoE fields switched on.
    """
    return change_model(dense_ct.model(), **moe_settings(SPEC))


pretrain_recipe = upcycled_recipe(NAME, dense_ct.pretrain_recipe, dense_ct.DENSE)


@run.cli.factory(target=pipeline, name=NAME)
def pipeline_recipe(dir: str = "runs/qwen3_600m_e8t2", dense: str = dense_ct.DENSE, processes: int = 1) -> run.Partial:
    """Create the whole chain: import, data, upcycle, pretrain, dense baseline, export, evaluate, report.

    Args:
        dir (str): Folder of the run.
        dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
        processes (int): Ranks of the two training stages; the experts are spread over them.

    Returns:
        run.Partial: Partial configuration of the pipeline.

    Examples:
        CLI usage:
            $ nemo upcycle pipeline --factory qwen3_600m_e8t2 dir=runs/qwen3 --yes
    """
    return run.Partial(
        pipeline,
        dir=dir,
        dense=dense,
        pretrain=pretrain_recipe(num_gpus_per_node=processes, expert_parallelism=processes, dense=dense),
        dense_ct=dense_ct.pretrain_recipe(num_gpus_per_node=processes, dense=dense),
    )
