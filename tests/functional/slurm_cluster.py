"""A cluster as a user names it in a script, with the recipes of the demo cut down: what test_slurm.py starts."""

# No postponed annotations: NeMo-Run reads those of factories.

import os
from pathlib import Path

import nemo_run as run

from nemo_upcycle.pipeline.launch import pipeline
from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
from tests.functional.tiny import tiny_pipeline


@run.cli.factory
@run.autoconvert
def cluster() -> run.SlurmExecutor:
    return run.SlurmExecutor(
        account=os.environ.get("SLURM_ACCOUNT", "root"),
        partition=os.environ.get("SLURM_PARTITION"),
        time="00:20:00",
        mem="0",
        tunnel=run.LocalTunnel(job_dir=os.path.join(os.environ["NEMORUN_HOME"], "experiments")),
        packager=run.Packager(),
        env_vars={"OMP_NUM_THREADS": "1"},
    )


@run.cli.factory(target=pipeline, name="tiny")
def tiny(inputs: str, dir: str) -> run.Partial:
    """The chain on a tiny parent; its training jobs have two nodes of one rank."""
    moe = smollm2_135m_e8t2.pretrain_recipe(num_nodes=2, num_gpus_per_node=1, expert_parallelism=2)
    dense_ct = smollm2_135m_dense_ct.pretrain_recipe(num_nodes=2, num_gpus_per_node=1)
    return tiny_pipeline(Path(inputs), Path(dir), moe, dense_ct)


if __name__ == "__main__":
    run.cli.main(pipeline)
