"""Settings that a job would reject, and words of the answer to each; what is typed behind `nemo upcycle pipeline`.

FILES is a folder that `tests.functional.test_rejected` fills.
"""

from __future__ import annotations


#: Site -> what names it; the folder of the run is added. `here` has no files to render.
SITES = {
    "slurm": "run.executor=slurm run.executor.account=me run.executor.partition=a run.executor.container_image=null",
    "kubernetes": (
        "run.executor=kubernetes run.executor.image=a run.executor.claim=b run.executor.mount_path=FILES "
        "run.executor.run_as=1000:1000"
    ),
    "here": "",
}
#: A file that asks for GPUs for one of three stages that need some.
OLD = """
executor: slurm
container_mounts: ["/shared:/shared"]
stages:
  data: {partition: cpu, cpus_per_task: 64, time: "24:00:00"}
  pretrain: {gpus_per_node: 8, mem: 0, exclusive: true, time: "04:00:00", signal: TERM@600, hang_detection: true}
"""
GPUS = "pretrain.trainer.accelerator=gpu dense_ct.trainer.accelerator=gpu"
_STAGE = "run.executor.stages"
OF_SLURM = {
    # what no stage has
    "run.executor.array=0-3": "run.executor.array is 0-3; expected nothing",
    "run.executor.heterogeneous=true": "run.executor.heterogeneous is True; expected nothing",
    "run.executor.launcher=torchrun": "run.executor.launcher is torchrun; expected nothing",
    f"{_STAGE}.pretrain.write_gib_s=1": f"{_STAGE}.pretrain.write_gib_s is 1",
    # values
    "run.executor.env_vars.A-B=1": "run.executor.env_vars is 'A-B'",
    "run.executor.time=08:00:00": "run.executor.time is 08:00:00; expected nothing: conf/exec",
    f"{_STAGE}.data.time=tomorrow": f"{_STAGE}.data.time is 'tomorrow'; expected minutes, HH:MM:SS",
    f"{_STAGE}.pretrain.time=1h": f"{_STAGE}.pretrain.time is '1h'",
    "run.executor.mem=lots": ".mem is 'lots'; expected a size",
    f"{_STAGE}.data.mem_per_cpu=4G": f"{_STAGE}.data.mem and {_STAGE}.data.mem_per_cpu is all; expected one",
    f"{_STAGE}.pretrain.signal=USR1@600": f"{_STAGE}.pretrain.signal is USR1@600; expected TERM",
    f"{_STAGE}.pretrain.signal=B:TERM@600": f"{_STAGE}.pretrain.signal is B:TERM@600; expected TERM",
    "run.executor.cpus_per_task=0": ".cpus_per_task is 0; expected a whole number, 1 or more",
    f"{_STAGE}.pretrain.gpus_per_node=-1": f"{_STAGE}.pretrain.gpus_per_node is -1",
    "run.executor.open_mode=overwrite": ".open_mode is 'overwrite'; expected append or truncate",
    "run.executor.container_image=a run.executor.container_mounts=[shared:/shared]": "container_mounts is shared:/",
    "run.executor.python='/my/py thon'": "path '/my/py thon' is a character that NeMo-Run's batch script",
    "run.executor.card=h1000": "run.executor.card 'h1000' does not exist. Did you mean 'h100'?",
    "run.executor.write_gib_s=0": "run.executor.write_gib_s is 0",
    "run.executor.performance.NCCL_NVLS_ENABEL=1": "Did you mean 'NCCL_NVLS_ENABLE'?",
    "run.executor.account=???": "run.executor.account is nothing",
    "run.executor.partition=??? run.executor.container_image=???": "run.executor.container_image is nothing",
    # GPUs
    f"{_STAGE}.pretrain.gpus_per_node=1": f"{_STAGE}.pretrain.gpus_per_node is 1; expected at least 2",
    f"{GPUS} {_STAGE}.pretrain.gpus_per_node=null": f"{_STAGE}.pretrain.gpus_per_node is 0; expected 2, one a rank",
    f"{GPUS} {_STAGE}.dense_ct.gpus_per_node=null": f"{_STAGE}.dense_ct.gpus_per_node is 0; expected 2, one a rank",
    f"{GPUS} {_STAGE}.evaluate.gpus_per_node=null": f"{_STAGE}.evaluate.gpus_per_node is 0; expected 1 or more",
    f"{GPUS} {_STAGE}.pretrain.gpus_per_node=null {_STAGE}.pretrain.gres=gpu:1": "got 1; expected at least 2",
    "LARGE run.executor=FILES/old.yaml": f"{_STAGE}.evaluate.gpus_per_node is 0; expected 1 or more",
    # settings of a large model
    f"LARGE {_STAGE}.pretrain.time=00:10:00 {_STAGE}.pretrain.signal=null": f"{_STAGE}.pretrain.time is 00:10:00",
    f"LARGE {_STAGE}.dense_ct.time=00:10:00": f"{_STAGE}.dense_ct.time is 00:10:00; expected more than ",
    "LARGE run.executor.card=rtx4090 dense_ct=None": "pretrain: memory does not fit",
    # folders
    "dir=/nemo_runs/a": "path '/nemo_runs/a' is '/nemo_run' in it",
}
OF_KUBERNETES = {
    "run.executor.image=???": "run.executor.image is nothing",
    "run.executor.namespace=My_Space": "run.executor.namespace is 'My_Space'",
    "run.executor.kind=trainjob-2.1": "run.executor.kind 'trainjob-2.1' does not exist",
    "run.executor.restarts=3": "run.executor.restarts is 3; expected nothing",
    "run.executor.report_within_s=10": "run.executor.report_within_s is 10",
    f"{_STAGE}.pretrain.memory_gib=32": f"{_STAGE}.pretrain.shared_memory_gib is 64",
    "run.executor.secret_env_vars.HF_TOKEN=hub/": "run.executor.secret_env_vars.HF_TOKEN is 'hub/'",
    "run.executor.tolerations='[{key: a, operator: Exist}]'": "Did you mean 'Exists'?",
    f"{_STAGE}.pretrain.gpus_per_node=1": f"{_STAGE}.pretrain.gpus_per_node is 1; expected at least 2",
    f"{GPUS} {_STAGE}.evaluate.gpus_per_node=0": f"{_STAGE}.evaluate.gpus_per_node is 0; expected 1 or more",
    f"{_STAGE}.pretrain.cpus=-1": f"{_STAGE}.pretrain.cpus is -1",
    "run.executor.mount_path=runs": "got 'runs'; expected an absolute path",
    "dir=/elsewhere": "dir /elsewhere is a path that the pods do not see",
    f"{_STAGE}.pretrain.namespace=other": f"{_STAGE}.pretrain.namespace is other",
    f"LARGE {_STAGE}.pretrain.active_deadline_s=600": f"{_STAGE}.pretrain.active_deadline_s is 600s",
    "--detach": "--detach is an executor that needs the launcher",
}
#: What every site rejects; typed for Slurm.
OF_ALL = {
    # settings that the chain would replace
    "pretrain.log.log_dir=/scratch/fast": "pretrain.log.log_dir is /scratch/fast; expected no such setting",
    "dense_ct.log.log_dir=/scratch/fast": "dense_ct.log.log_dir is /scratch/fast; expected no such setting",
    "pretrain.log.version=one": "pretrain.log.version is one; expected no such setting",
    "pretrain.log.ckpt.dirpath=/scratch/fast": "pretrain.log.ckpt.dirpath is /scratch/fast",
    "pretrain.resume.resume_if_exists=false": "pretrain.resume.resume_if_exists is false",
    "pretrain.data.folder=/a": "pretrain.data.folder is /a; expected no such setting",
    # the trainer, layout and data
    "pretrain.optim.config.lr=-1": "pretrain.optim.config.lr is -1",
    "pretrain.trainer.max_steps=0": "pretrain.trainer.max_steps is 0",
    "pretrain.data.micro_batch_size=7": "pretrain.data.global_batch_size is 2; expected a multiple",
    "pretrain.trainer.strategy.tensor_model_parallel_size=5": "tensor_model_parallel_size",
    "pretrain.resume.restore_config.spec.top_k=9": "pretrain.resume.restore_config.spec.top_k is 9",
    "pretrain.model.config.recompute_granularity=banana": "pretrain: the training cannot be constructed: ValueError: ",
    "pretrain.model.config.num_layers=29": "pretrain.model.config.num_layers is 29",
    # inputs
    "dir=s3://bucket/run": "dir is s3://bucket/run; expected a path on this machine",
    "dir=/dev/null/x": "/dev/null is a file; expected a writable folder",
    "dir=FILES": "got a folder with a.txt",
    "dense=/nope": "model '/nope' is no such folder",
    "data=bogus": "blend 'bogus' does not exist",
    "data=s3://bucket/mine.yaml": "data is s3://bucket/mine.yaml; expected a path on this machine",
    "data=chatterbot": "data is chatterbot: conversations; expected texts",
    "evaluation=dmeo": "Did you mean 'demo'?",
    "evaluation=answers": "evaluation answers is ",
    "trained_on=300B": "setting 'trained_on' left in 0.3.0",  # a command line of 0.2
    "--from pretrain": "stage 'import' in ",
    # several at once
    "run.executor.partition=??? pretrain.optim.config.lr=-1 data=bogus": "run.executor.partition is nothing",
    "run.executor.array=0-3 pretrain.optim.config.lr=-1 dense=/nope": "4 mistakes:",
}
OF_HERE = {
    "pretrain.trainer.num_nodes=2": "pretrain.trainer.num_nodes is 2; expected 1 on this machine",
    "pretrain.trainer.accelerator=gpu": "pretrain.trainer.accelerator is gpu",
    "pretrain.log.log_dir=/scratch/fast": "pretrain.log.log_dir is /scratch/fast; expected no such setting",
    "dir=s3://bucket/run": "dir is s3://bucket/run; expected a path on this machine",
    "--detach": "--detach is an executor that needs the launcher",
}
REJECTED = [
    (site, typed, words)
    for site, rows in (
        ("slurm", OF_SLURM),
        ("kubernetes", OF_KUBERNETES),
        ("slurm", OF_ALL),
        ("here", OF_HERE),
    )
    for typed, words in rows.items()
]
