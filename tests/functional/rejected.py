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
    "run.executor.array=0-3": "run.executor.array: got 0-3, expected nothing",
    "run.executor.heterogeneous=true": "run.executor.heterogeneous: got True, expected nothing",
    "run.executor.launcher=torchrun": "run.executor.launcher: got torchrun, expected nothing",
    f"{_STAGE}.pretrain.write_gib_s=1": f"{_STAGE}.pretrain.write_gib_s: got 1",
    # values
    "run.executor.env_vars.A-B=1": "run.executor.env_vars: got 'A-B'",
    "run.executor.time=08:00:00": "run.executor.time: got 08:00:00, expected nothing: conf/exec",
    f"{_STAGE}.data.time=tomorrow": f"{_STAGE}.data.time: got 'tomorrow', expected minutes, HH:MM:SS",
    f"{_STAGE}.pretrain.time=1h": f"{_STAGE}.pretrain.time: got '1h'",
    "run.executor.mem=lots": ".mem: got 'lots', expected a size",
    f"{_STAGE}.data.mem_per_cpu=4G": f"{_STAGE}.data.mem and {_STAGE}.data.mem_per_cpu: got all, expected one",
    f"{_STAGE}.pretrain.signal=USR1@600": f"{_STAGE}.pretrain.signal: got USR1@600, expected TERM",
    f"{_STAGE}.pretrain.signal=B:TERM@600": f"{_STAGE}.pretrain.signal: got B:TERM@600, expected TERM",
    "run.executor.cpus_per_task=0": ".cpus_per_task: got 0, expected a whole number, 1 or more",
    f"{_STAGE}.pretrain.gpus_per_node=-1": f"{_STAGE}.pretrain.gpus_per_node: got -1",
    "run.executor.open_mode=overwrite": ".open_mode: got 'overwrite', expected append or truncate",
    "run.executor.container_image=a run.executor.container_mounts=[shared:/shared]": "container_mounts: got shared:/",
    "run.executor.python='/my/py thon'": "path '/my/py thon': got a character that NeMo-Run's batch script",
    "run.executor.card=h1000": "run.executor.card 'h1000' does not exist. Did you mean 'h100'?",
    "run.executor.write_gib_s=0": "run.executor.write_gib_s: got 0",
    "run.executor.performance.NCCL_NVLS_ENABEL=1": "Did you mean 'NCCL_NVLS_ENABLE'?",
    "run.executor.account=???": "run.executor.account: got nothing",
    "run.executor.partition=??? run.executor.container_image=???": "run.executor.container_image: got nothing",
    # GPUs
    f"{_STAGE}.pretrain.gpus_per_node=1": f"{_STAGE}.pretrain.gpus_per_node: got 1, expected at least 2",
    f"{GPUS} {_STAGE}.pretrain.gpus_per_node=null": f"{_STAGE}.pretrain.gpus_per_node: got 0, expected 2, one a rank",
    f"{GPUS} {_STAGE}.dense_ct.gpus_per_node=null": f"{_STAGE}.dense_ct.gpus_per_node: got 0, expected 2, one a rank",
    f"{GPUS} {_STAGE}.evaluate.gpus_per_node=null": f"{_STAGE}.evaluate.gpus_per_node: got 0, expected 1 or more",
    f"{GPUS} {_STAGE}.pretrain.gpus_per_node=null {_STAGE}.pretrain.gres=gpu:1": "got 1, expected at least 2",
    "LARGE run.executor=FILES/old.yaml": f"{_STAGE}.evaluate.gpus_per_node: got 0, expected 1 or more",
    # settings of a large model
    f"LARGE {_STAGE}.pretrain.time=00:10:00 {_STAGE}.pretrain.signal=null": f"{_STAGE}.pretrain.time: got 00:10:00",
    f"LARGE {_STAGE}.dense_ct.time=00:10:00": f"{_STAGE}.dense_ct.time: got 00:10:00, expected more than ",
    "LARGE run.executor.card=rtx4090 dense_ct=None": "pretrain: memory does not fit",
    # folders
    "dir=/nemo_runs/a": "path '/nemo_runs/a': got '/nemo_run' in it",
}
OF_KUBERNETES = {
    "run.executor.image=???": "run.executor.image: got nothing",
    "run.executor.namespace=My_Space": "run.executor.namespace: got 'My_Space'",
    "run.executor.kind=trainjob-2.1": "run.executor.kind 'trainjob-2.1' does not exist",
    "run.executor.restarts=3": "run.executor.restarts: got 3, expected nothing",
    "run.executor.report_within_s=10": "run.executor.report_within_s: got 10",
    f"{_STAGE}.pretrain.memory_gib=32": f"{_STAGE}.pretrain.shared_memory_gib: got 64",
    "run.executor.secret_env_vars.HF_TOKEN=hub/": "run.executor.secret_env_vars.HF_TOKEN: got 'hub/'",
    "run.executor.tolerations='[{key: a, operator: Exist}]'": "Did you mean 'Exists'?",
    f"{_STAGE}.pretrain.gpus_per_node=1": f"{_STAGE}.pretrain.gpus_per_node: got 1, expected at least 2",
    f"{GPUS} {_STAGE}.evaluate.gpus_per_node=0": f"{_STAGE}.evaluate.gpus_per_node: got 0, expected 1 or more",
    f"{_STAGE}.pretrain.cpus=-1": f"{_STAGE}.pretrain.cpus: got -1",
    "run.executor.mount_path=runs": "got 'runs', expected an absolute path",
    "dir=/elsewhere": "dir /elsewhere: got a path that the pods do not see",
    f"{_STAGE}.pretrain.namespace=other": f"{_STAGE}.pretrain.namespace: got other",
    f"LARGE {_STAGE}.pretrain.active_deadline_s=600": f"{_STAGE}.pretrain.active_deadline_s: got 600s",
    "--detach": "--detach: got an executor that needs the launcher",
}
#: What every site rejects; typed for Slurm.
OF_ALL = {
    # settings that the chain would replace
    "pretrain.log.log_dir=/scratch/fast": "pretrain.log.log_dir: got /scratch/fast, expected no such setting",
    "dense_ct.log.log_dir=/scratch/fast": "dense_ct.log.log_dir: got /scratch/fast, expected no such setting",
    "pretrain.log.version=one": "pretrain.log.version: got one, expected no such setting",
    "pretrain.log.ckpt.dirpath=/scratch/fast": "pretrain.log.ckpt.dirpath: got /scratch/fast",
    "pretrain.resume.resume_if_exists=false": "pretrain.resume.resume_if_exists: got false",
    "pretrain.data.folder=/a": "pretrain.data.folder: got /a, expected no such setting",
    # the trainer, layout and data
    "pretrain.optim.config.lr=-1": "pretrain.optim.config.lr: got -1",
    "pretrain.trainer.max_steps=0": "pretrain.trainer.max_steps: got 0",
    "pretrain.data.micro_batch_size=7": "pretrain.data.global_batch_size: got 2, expected a multiple",
    "pretrain.trainer.strategy.tensor_model_parallel_size=5": "tensor_model_parallel_size",
    "pretrain.resume.restore_config.spec.top_k=9": "pretrain.resume.restore_config.spec.top_k: got 9",
    "pretrain.model.config.recompute_granularity=banana": "pretrain: the training cannot be constructed: ValueError: ",
    "pretrain.model.config.num_layers=29": "pretrain.model.config.num_layers: got 29",
    # inputs
    "dir=s3://bucket/run": "dir: got s3://bucket/run, expected a path on this machine",
    "dir=/dev/null/x": "/dev/null is a file, expected a writable folder",
    "dir=FILES": "got a folder with a.txt",
    "dense=/nope": "model '/nope': got no such folder",
    "data=bogus": "blend 'bogus' does not exist",
    "data=s3://bucket/mine.yaml": "data: got s3://bucket/mine.yaml, expected a path on this machine",
    "data=chatterbot": "data: got chatterbot: conversations, expected texts",
    "evaluation=dmeo": "Did you mean 'demo'?",
    "evaluation=answers": "evaluation answers: got ",
    "trained_on=300B": "setting 'trained_on' left in 0.3.0",  # a command line of 0.2
    "--from pretrain": "stage 'import' in ",
    # several at once
    "run.executor.partition=??? pretrain.optim.config.lr=-1 data=bogus": "run.executor.partition: got nothing",
    "run.executor.array=0-3 pretrain.optim.config.lr=-1 dense=/nope": "4 mistakes:",
}
OF_HERE = {
    "pretrain.trainer.num_nodes=2": "pretrain.trainer.num_nodes: got 2, expected 1 on this machine",
    "pretrain.trainer.accelerator=gpu": "pretrain.trainer.accelerator: got gpu",
    "pretrain.log.log_dir=/scratch/fast": "pretrain.log.log_dir: got /scratch/fast, expected no such setting",
    "dir=s3://bucket/run": "dir: got s3://bucket/run, expected a path on this machine",
    "--detach": "--detach: got an executor that needs the launcher",
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
