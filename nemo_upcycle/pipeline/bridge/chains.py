"""The chains of this package's recipes in Megatron-Bridge, as factories of `nemo upcycle pipeline`."""

import nemo_run as run

from nemo_upcycle.pipeline.bridge.pipeline import pipeline


@run.cli.factory(target=pipeline, name="smollm2_135m_e8t2")
def smollm2_135m_e8t2(dir: str = "runs/smollm2_135m_e8t2") -> run.Partial:
    """Create the chain of SmolLM2-135M, which needs one GPU, or none.

    Args:
        dir (str): Folder of the run.

    Returns:
        run.Partial: Partial configuration of the pipeline.

    Examples:
        CLI usage:
            $ nemo upcycle pipeline --factory smollm2_135m_e8t2 dir=runs/mine pretrain.train.train_iters=4 --yes
    """
    return run.Partial(
        pipeline,
        dir=dir,
        dense="asset://smollm2-135m",
        recipe="smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config",
        dense_ct="smollm2_135m_dense_ct_pretrain_1gpu_h100_bf16_config",
    )


@run.cli.factory(target=pipeline, name="llama3_8b_e8t2")
def llama3_8b_e8t2(dir: str = "runs/llama3_8b_e8t2") -> run.Partial:
    """Create the paper's chain: Llama 3 8B on 512 H100, its dense baseline, the paper's blend and tasks.

    Args:
        dir (str): Folder of the run, which all nodes share.

    Returns:
        run.Partial: Partial configuration of the pipeline.

    Examples:
        CLI usage:
            $ nemo upcycle pipeline --factory llama3_8b_e8t2 run.executor=slurm dir=/shared/runs/mine --yes
    """
    return run.Partial(
        pipeline,
        dir=dir,
        dense="hf://meta-llama/Meta-Llama-3-8B",
        recipe="llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config",
        dense_ct="llama3_8b_dense_ct_pretrain_512gpu_h100_bf16_config",
        data="redpajama_v2_academic_7_3",
        evaluation="paper",
    )
