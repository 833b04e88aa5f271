"""Settings that a job would reject, typed after `nemo upcycle pipeline` -> words of the answer.

FILES stands for a folder that `tests.functional.test_rejected` fills.
"""

from __future__ import annotations


#: Site -> settings that select the site; the test adds the run's folder. `here` has no files to render.
SITES = {
    "slurm": "run.executor=slurm run.executor.account=me run.executor.partition=a run.executor.container_image=null",
    "kubernetes": (
        "run.executor=kubernetes run.executor.image=a run.executor.claim=b run.executor.mount_path=FILES "
        "run.executor.run_as=1000:1000"
    ),
    "here": "",
}
#: An executor file that requests GPUs for only one of three stages that need them.
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
    # settings that no stage has
    "run.executor.array=0-3": "run.executor.array is 0-3, but cannot be set here",
    "run.executor.heterogeneous=true": "run.executor.heterogeneous is True, but cannot be set here",
    "run.executor.launcher=torchrun": "run.executor.launcher is torchrun, but cannot be set here",
    f"{_STAGE}.pretrain.write_gib_s=1": f"{_STAGE}.pretrain.write_gib_s is 1.0, but this setting must be",
    # invalid values
    "run.executor.env_vars.A-B=1": "run.executor.env_vars is 'A-B'",
    "run.executor.time=08:00:00": "run.executor.time has no effect: conf/exec",
    f"{_STAGE}.data.time=tomorrow": f"{_STAGE}.data.time is 'tomorrow'; expected minutes, HH:MM:SS",
    f"{_STAGE}.pretrain.time=1h": f"{_STAGE}.pretrain.time is '1h'",
    "run.executor.mem=lots": ".mem is 'lots'; expected a size",
    f"{_STAGE}.data.mem_per_cpu=4G": f"{_STAGE}.data.mem and {_STAGE}.data.mem_per_cpu cannot be combined",
    f"{_STAGE}.pretrain.signal=USR1@600": f"{_STAGE}.pretrain.signal is USR1@600; expected TERM",
    f"{_STAGE}.pretrain.signal=B:TERM@600": f"{_STAGE}.pretrain.signal is B:TERM@600; expected TERM",
    "run.executor.cpus_per_task=0": ".cpus_per_task is 0; expected a whole number, 1 or more",
    f"{_STAGE}.pretrain.gpus_per_node=-1": f"{_STAGE}.pretrain.gpus_per_node is -1",
    "run.executor.open_mode=overwrite": ".open_mode is 'overwrite'; expected append or truncate",
    "run.executor.container_image=a run.executor.container_mounts=[shared:/shared]": "container_mounts is shared:/",
    "run.executor.python='/my/py thon'": "Path '/my/py thon' has a character that NeMo-Run's batch script",
    "run.executor.card=h1000": "run.executor.card 'h1000' does not exist. Did you mean 'h100'?",
    "run.executor.write_gib_s=0": "run.executor.write_gib_s is 0",
    "run.executor.performance.NCCL_NVLS_ENABEL=1": "Did you mean 'NCCL_NVLS_ENABLE'?",
    "run.executor.account=???": "run.executor.account is missing",
    "run.executor.partition=??? run.executor.container_image=???": "run.executor.container_image is missing",
    # GPUs
    f"{_STAGE}.pretrain.gpus_per_node=1": f"{_STAGE}.pretrain.gpus_per_node is 1; expected at least 2",
    f"{GPUS} {_STAGE}.pretrain.gpus_per_node=null": "pretrain.gpus_per_node is 0; expected 2, one for each rank",
    f"{GPUS} {_STAGE}.dense_ct.gpus_per_node=null": "dense_ct.gpus_per_node is 0; expected 2, one for each rank",
    f"{GPUS} {_STAGE}.evaluate.gpus_per_node=null": f"{_STAGE}.evaluate.gpus_per_node is 0; expected 1 or more",
    f"{GPUS} {_STAGE}.pretrain.gpus_per_node=null {_STAGE}.pretrain.gres=gpu:1": "is 1; expected at least 2",
    "LARGE run.executor=FILES/old.yaml": f"{_STAGE}.evaluate.gpus_per_node is 0; expected 1 or more",
    # settings of a large model
    f"LARGE {_STAGE}.pretrain.time=00:10:00 {_STAGE}.pretrain.signal=null": "pretrain.time 00:10:00 is too short",
    f"LARGE {_STAGE}.dense_ct.time=00:10:00": f"{_STAGE}.dense_ct.time 00:10:00 is too short: the stage needs ",
    "LARGE run.executor.card=rtx4090 dense_ct=None": "pretrain: memory does not fit",
    # folders
    "dir=/nemo_runs/a": "Path '/nemo_runs/a' has '/nemo_run' in it",
}
OF_KUBERNETES = {
    "run.executor.image=???": "run.executor.image is missing",
    "run.executor.namespace=My_Space": "run.executor.namespace is 'My_Space'",
    "run.executor.kind=trainjob-2.1": "run.executor.kind 'trainjob-2.1' does not exist",
    "run.executor.restarts=3": "run.executor.restarts is 3, but a job of kind ",
    "run.executor.report_within_s=10": "run.executor.report_within_s is 10",
    f"{_STAGE}.pretrain.memory_gib=32": f"{_STAGE}.pretrain.shared_memory_gib is 64",
    "run.executor.secret_env_vars.HF_TOKEN=hub/": "run.executor.secret_env_vars.HF_TOKEN is 'hub/'",
    "run.executor.tolerations='[{key: a, operator: Exist}]'": "Did you mean 'Exists'?",
    f"{_STAGE}.pretrain.gpus_per_node=1": f"{_STAGE}.pretrain.gpus_per_node is 1; expected at least 2",
    f"{GPUS} {_STAGE}.evaluate.gpus_per_node=0": f"{_STAGE}.evaluate.gpus_per_node is 0; expected 1 or more",
    f"{_STAGE}.pretrain.cpus=-1": f"{_STAGE}.pretrain.cpus is -1",
    "run.executor.mount_path=runs": "is 'runs'; expected an absolute path",
    "dir=/elsewhere": "Folder /elsewhere is not visible in the pods",
    f"{_STAGE}.pretrain.namespace=other": f"{_STAGE}.pretrain.namespace is other, but this setting must be",
    f"LARGE {_STAGE}.pretrain.active_deadline_s=600": f"{_STAGE}.pretrain.active_deadline_s 600s is too short",
    "--detach": "--detach needs a cluster's executor",
}
#: Settings that every site rejects. The test types them only for Slurm.
OF_ALL = {
    # settings that the chain would replace
    "pretrain.log.log_dir=/scratch/fast": "pretrain.log.log_dir cannot be set: the run's folder decides it",
    "dense_ct.log.log_dir=/scratch/fast": "dense_ct.log.log_dir cannot be set: ",
    "pretrain.log.version=one": "pretrain.log.version cannot be set: ",
    "pretrain.log.ckpt.dirpath=/scratch/fast": "pretrain.log.ckpt.dirpath cannot be set: ",
    "pretrain.resume.resume_if_exists=false": "pretrain.resume.resume_if_exists cannot be set: ",
    "pretrain.data.folder=/a": "pretrain.data.folder cannot be set: ",
    # the trainer, layout and data
    "pretrain.optim.config.lr=-1": "pretrain.optim.config.lr is -1",
    "pretrain.trainer.max_steps=0": "pretrain.trainer.max_steps is 0",
    "pretrain.data.micro_batch_size=7": "pretrain.data.global_batch_size is 2; expected a multiple",
    "pretrain.trainer.strategy.tensor_model_parallel_size=5": "tensor_model_parallel_size",
    "pretrain.resume.restore_config.spec.top_k=9": "pretrain.resume.restore_config.spec.top_k is 9",
    "pretrain.model.config.recompute_granularity=banana": "pretrain: the training cannot be constructed: ValueError: ",
    "pretrain.model.config.num_layers=29": "pretrain.model.config.num_layers is 29",
    # inputs
    "dir=s3://bucket/run": "dir is s3://bucket/run, not a path on this machine",
    "dir=/dev/null/x": "/dev/null is a file. Choose another dir.",
    "dir=FILES": "has other files: a.txt",
    "dense=/nope": "No model folder /nope. ",
    "data=bogus": "blend 'bogus' does not exist",
    "data=s3://bucket/mine.yaml": "data is s3://bucket/mine.yaml, not a path on this machine",
    "data=chatterbot": "Data chatterbot are conversations, and pretrain reads texts",
    "evaluation=dmeo": "Did you mean 'demo'?",
    "evaluation=answers": "Suite answers has the task ",
    "trained_on=300B": "setting 'trained_on' was removed in 0.3.0",  # a command line of 0.2
    "--from pretrain": "Stage 'import' in ",
    # several mistakes at once
    "run.executor.partition=??? pretrain.optim.config.lr=-1 data=bogus": "run.executor.partition is missing",
    "run.executor.array=0-3 pretrain.optim.config.lr=-1 dense=/nope": "4 mistakes:",
}
OF_HERE = {
    "pretrain.trainer.num_nodes=2": "pretrain.trainer.num_nodes is 2; expected 1 on this machine",
    "pretrain.trainer.accelerator=gpu": "pretrain.trainer.accelerator is gpu, and this machine has no GPU",
    "pretrain.log.log_dir=/scratch/fast": "pretrain.log.log_dir cannot be set: the run's folder decides it",
    "dir=s3://bucket/run": "dir is s3://bucket/run, not a path on this machine",
    "--detach": "--detach needs a cluster's executor",
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
