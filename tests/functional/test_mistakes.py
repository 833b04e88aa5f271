"""What a user can get wrong on the command line of the pipeline: one message, status 2, nothing written."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers

from nemo_upcycle.pipeline.chain import JOBS
from nemo_upcycle.pipeline.stages import BY_NAME
from nemo_upcycle.utils.files import in_use, write_json
from tests.blends import write_blend
from tests.distributed.ranks import run_ranks, server
from tests.fifo import held_by_reader
from tests.functional.command import NEMO, run
from tests.functional.tiny import SEQUENCE, SIZES, write_parent
from tests.functional.typed import Answer, type_commands
from tests.waiting import HANG_S


DEMO = "--factory smollm2_135m_e8t2"
SLURM = "run.executor=slurm run.executor.account=me run.executor.partition=a run.executor.container_image=null"
#: What is typed -> words of the answer. FILES is a folder that `_files` fills.
MISTAKES = {
    # what is not there
    f"{DEMO} dense=/nope": "model '/nope': got no such folder",
    f"{DEMO} dense=asset://smollm2": "Did you mean 'smollm2-135m'?",
    f"{DEMO} dense=s3://bucket/model": "address scheme 's3' does not exist",
    f"{DEMO} dense=hf://nobody/nothing": "download of nobody/nothing from the Hugging Face hub: got ",
    f"{DEMO} dense=FILES/empty": "FILES/empty",
    f"{DEMO} dense=FILES/cut": "FILES/cut",
    f"{DEMO} dense=FILES/tiny": "pretrain.model.config.num_layers: got 30, expected 4, as FILES/tiny has",
    f"{DEMO} data=bogus": "blend 'bogus' does not exist. Valid: PATH.yaml, ",
    f"{DEMO} data=FILES/absent.yaml": "got No such file or directory, expected a YAML file",
    f"{DEMO} data=FILES/not.yaml": "expected valid YAML",
    f"{DEMO} data=FILES/source.yaml": "Did you mean 'sources'?",
    f"{DEMO} data=FILES/globs.yaml": "pattern texts/*.txt: got no file",
    f"{DEMO} evaluation=dmeo": "Did you mean 'demo'?",
    f"{DEMO} evaluation=FILES/key.yaml": "FILES/key.yaml",
    "--factory llama3_8b_e8t2 dense=asset://smollm2-135m --dryrun": "num_layers: got 32, expected 30, as asset://smoll",
    f"{DEMO} dir=FILES": "got a folder with a.txt, ",
    f"{DEMO} pretrain=wrong_recipe.mine": "FILES/wrong_recipe.py, line 2: got NameError: name 'llm' is not defined",
    f"{DEMO} dir=/dev/null/x": "/dev/null is a file, expected a writable folder",
    f"{DEMO} dir=FILES/not.yaml": "FILES/not.yaml is a file",
    # numbers
    f"{DEMO} pretrain.trainer.max_steps=0": "pretrain.trainer.max_steps: got 0, expected a whole number from 1 on",
    f"{DEMO} dense_ct.trainer.max_steps=-1": "dense_ct.trainer.max_steps: got -1",
    f"{DEMO} pretrain.trainer.num_nodes=-1": "pretrain.trainer.num_nodes: got -1",
    f"{DEMO} pretrain.trainer.num_nodes=-1 --dryrun": "pretrain.trainer.num_nodes: got -1",
    f"{DEMO} pretrain.trainer.num_nodes=2": "pretrain.trainer.num_nodes: got 2, expected 1 on this machine",
    f"{DEMO} pretrain.trainer.devices=auto": "pretrain.trainer.devices: got auto",
    f"{DEMO} pretrain.trainer.strategy.tensor_model_parallel_size=5": (
        "pretrain.trainer.strategy.tensor_model_parallel_size: got 5"
    ),
    f"{DEMO} pretrain.trainer.strategy.expert_model_parallel_size=3": (
        "pretrain.trainer.strategy.expert_model_parallel_size: got 3"
    ),
    f"{DEMO} pretrain.resume.restore_config.spec.top_k=9": (
        "pretrain.resume.restore_config.spec.top_k: got 9, expected a whole number, 1 to 8"
    ),
    f"{DEMO} pretrain.resume.restore_config.spec.top_k=9 --dryrun": "top_k: got 9",
    f"{DEMO} pretrain.resume.restore_config.spec=None": "expected an UpcycleSpec",
    # values that make no sense
    f"{DEMO} pretrain.optim.config.lr=-1": "pretrain.optim.config.lr: got -1",
    f"{DEMO} pretrain.optim.config.lr=nan": "pretrain.optim.config.lr: got nan, expected a finite number",
    f"{DEMO} dense_ct.optim.config.lr=1e400": "dense_ct.optim.config.lr: got inf",
    f"{DEMO} pretrain.optim.config.lr=1e-7": "pretrain.optim.lr_scheduler.min_lr: got 1e-05, expected at most ",
    f"{DEMO} pretrain.data.seq_length=0 --dryrun": "pretrain.data.seq_length: got 0",
    f"{DEMO} dense_ct.data.micro_batch_size=0": "dense_ct.data.micro_batch_size: got 0",
    f"{DEMO} pretrain.data.global_batch_size=-2": "pretrain.data.global_batch_size: got -2",
    f"{DEMO} pretrain.optim.router_lr_mult=-1 --dryrun": "pretrain.optim.router_lr_mult: got -1",
    f"{DEMO} pretrain.optim.aux_loss_end=0.1": "pretrain.optim.aux_loss_steps: got 0",
    f"{DEMO} pretrain.trainer.strategy.expert_model_parallel_size=0": (
        "pretrain.trainer.strategy.expert_model_parallel_size: got 0, expected 1 or more"
    ),
    f"{DEMO} pretrain.model.config.moe_router_bias_update_rate=-1": (
        "pretrain.model.config.moe_router_bias_update_rate: got -1"
    ),
    f"{DEMO} pretrain.model.config.moe_router_load_balancing_type=quantile_balancing": (
        "pretrain.model.config.moe_router_load_balancing_type: got quantile_balancing, expected a balancing that this "
        "Megatron-Core has"
    ),
    f"{DEMO} pretrain.model.config.mtp_num_layers=1": "pretrain.model.config.mtp_num_layers: got 1, expected None",
    f"{DEMO} dir=a dir=b --dryrun": "argument 'dir': got a and b, expected one value",
    f"{DEMO} --until data --until=report": "argument '--until': got data and report",
    # clusters
    f"{DEMO} run.executor=slrum": "Did you mean 'slurm'?",
    f"{DEMO} run.executor=slurm": "run.executor.account: got nothing, expected the account that jobs are charged to",
    f"{DEMO} run.executor=slurm run.executor.accounts=me": "run.executor: key 'accounts' does not exist.",
    f"{DEMO} run.executor=slurm run.executor.stages.pretrian.time=1": "Did you mean 'pretrain'?",
    f"{DEMO} run.executor=FILES/absent.yaml": "got No such file or directory, expected a YAML file",
    f"{DEMO} run.executor=kubernetes": "run.executor.image: got nothing",
    f"{DEMO} run.executor=kubernetes run.executor.image=a run.executor.claim=b run.executor.mount_path=/nowhere": (
        "got a path that the pods do not see, expected one below /nowhere"
    ),
    f"{DEMO} run.executor=slurm --render FILES/rendered": "run.executor.account: got nothing",
    f"{DEMO} --render FILES/rendered": "--render: got no cluster, expected run.executor=slurm|kubernetes",
    f"{DEMO} {SLURM} --render FILES/not.yaml": "--render FILES/not.yaml: got File exists, expected a writable folder",
    f"{DEMO} {SLURM} --render FILES/not.yaml/x": "--render FILES/not.yaml/x: got Not a directory",
    f"{DEMO} {SLURM} run.executor.gpus_per_node=eight": "run.executor.gpus_per_node: got 'eight', expected",
    # names and values of settings
    f"{DEMO} pretrain.trainer.max_step=3": "Did you mean 'pretrain.trainer.max_steps'?",
    f"{DEMO} pretrain.trainr.max_steps=3": "Did you mean 'pretrain.trainer'?",
    f"{DEMO} pretrain.trainer.strategy.tensor_parallel_size=2": "Did you mean 'pretrain.trainer",
    f"{DEMO} pretrian.trainer.max_steps=3": "Did you mean 'pretrain'?",
    f"{DEMO} daat=text": "Did you mean 'data'?",
    f"{DEMO} pretrain.trainer.max_steps=many": (
        "setting 'pretrain.trainer.max_steps': got 'many', expected int. Fix: write, for example, "
        "pretrain.trainer.max_steps="
    ),
    f"{DEMO} pretrain.optim.config.lr=high": "setting 'pretrain.optim.config.lr': got 'high', expected ",
    f"{DEMO} dir=": "argument 'dir=': got no value",
    f"{DEMO} runs/mine": "argument 'runs/mine': got no value",
    # the command itself
    "--factory smollm2_135m_e8t3": "Did you mean 'smollm2_135m_e8t2'?",
    "--factory llama3_8b_e8t2 data=sotu": "pretrain.trainer.num_nodes: got 64, expected 1 on this machine",
    "--factory smollm2_135m_e8t2(processs=2)": "Did you mean 'processes'?",
    "--factory smollm2_135m_e8t2(processes=two)": "got 'two', expected Optional[int]",
    "dir=FILES/run": "no dense, no pretrain",
    f"{DEMO} trained_on=lots --dryrun": "trained_on: got 'lots', expected a number: 100B",
    f"{DEMO} --dryrn": "Did you mean '--dryrun'?",
    # a part of the chain
    f"{DEMO} --until pretrian": "--until: stage 'pretrian' does not exist. Did you mean 'pretrain'?",
    f"{DEMO} --untill data": "Did you mean '--until'?",
    f"{DEMO} --until": "--until: got no value",
    f"{DEMO} --until --dryrun": "--until: got no value",
    f"{DEMO} --from=pretrain --until=data": "--until: got data, expected a stage from pretrain on",
    f"{DEMO} --only data --from import": "--only: got --from or --until as well",
    f"{DEMO} --from upcycle": "stage 'import' in",
    f"{DEMO} --detach": "expected Slurm",
    f"{DEMO} --yaml FILES/absent.yaml": "FILES/absent.yaml",
    f"{DEMO} --yaml FILES/key.yaml": "'flies'",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with mistakes in them."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty").mkdir()
    cut = write_parent(folder / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    write_blend(folder / "blend", write_parent(folder / "tiny"))
    tokenizer = Tokenizer.from_file(str(write_parent(folder / "other") / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "other/tokenizer.json"))
    (folder / "wrong_recipe.py").write_text("def mine():\n    return llm.llama3_8b.pretrain_recipe()\n")
    (folder / "wrong_import.py").write_text("import no_such_module\n")
    (folder / "not.yaml").write_text("files: [\n")
    (folder / "key.yaml").write_text("data: text\nflies: 1\n")
    (folder / "source.yaml").write_text("source: text\n")
    (folder / "globs.yaml").write_text("sources: {mine: {train: ['texts/*.txt'], validation: [a.txt]}}\n")
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text("the state of our union")
    (folder / "same.yaml").write_text("sources: {mine: {train: [a.txt], validation: [b.txt], heldout: [c.txt]}}\n")
    return folder


@pytest.fixture(scope="module")
def answers(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What is answered to every mistake."""
    commands = [f"upcycle pipeline {typed} --yes" for typed in MISTAKES]
    commands += [f"llm pretrain {typed} --yes" for typed in (*LLM_MISTAKES, NO_KERNELS, STOCK)]
    words = [[word.replace("FILES", str(files)) for word in command.split()] for command in commands]
    folder = str(tmp_path_factory.mktemp("typed"))
    (found,) = run_ranks(type_commands, 1, words, folder, str(files), process_group=False)
    return dict(zip(commands, found, strict=True))


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_with_one_message_and_status_2(
    typed: str, answers: dict[str, Answer], files: Path
) -> None:
    answer = answers[f"upcycle pipeline {typed} --yes"]
    assert answer.status == 2, answer.text
    assert MISTAKES[typed].replace("FILES", str(files)) in answer.text
    said = answer.text.partition("Error: ")[2]
    assert len(said.splitlines()) == 1
    assert "Traceback" not in answer.text
    if "--dryrun" not in typed:
        assert len(answer.text.splitlines()) <= 3, answer.text
    assert answer.written == []


BLEND = "--factory smollm2_135m_e8t2(data='FILES/blend',dense='FILES/tiny') data.seq_length=16"
LLM_MISTAKES = {
    f"{DEMO} resume.restore_config.spec.top_k=9": "top_k: got 9",
    f"{DEMO} trainer.num_nodes=-1 --dryrun": "trainer.num_nodes: got -1",
    f"{DEMO} trainer.max_step=3": "Did you mean 'trainer.max_steps'?",
    f"{DEMO} trainer.max_steps=many": "got 'many', expected int",
    "--factory smollm2_135m_e8t2(expert_parallelism=0)": (
        "trainer.strategy.expert_model_parallel_size: got 0, expected 1 or more"
    ),
    f"{DEMO} trainer.max_steps=2 trainer.max_steps=3": "argument 'trainer.max_steps': got 2 and 3",
    f"{DEMO} resume.restore_config.path=/nope": "model '/nope': got no such folder",
    f"{DEMO} resume.restore_config.path=FILES/tiny": "model.config.num_layers: got 30, expected 4, as FILES/tiny has",
    "--factory wrong_recipe.mine": "FILES/wrong_recipe.py, line 2: got NameError: name 'llm' is not defined",
    "--factory wrong_import.mine": "FILES/wrong_import.py, line 1: got ModuleNotFoundError: No module named 'no_such_",
    "--factory llama3_8b_e8t2(data='/nope') --dryrun": "data folder /nope: got ",
    "--factory smollm2_135m_e8t2(data='FILES/empty')": "data folder FILES/empty: got no _SUCCESS.json",
    "--factory smollm2_135m_e8t2(data='FILES/blend')": "tokens of the longest validation source in FILES/blend: got ",
    f"{BLEND} trainer.max_steps=2 data.dense=FILES/other": "tokenizer of FILES/blend: got sha256 ",
    "--factory llama3_8b_e8t2(capacity_factor=9)": "capacity_factor: got 9, expected at most num_experts / top_k (4)",
}
#: One of ours that this machine cannot train, and one of NeMo's.
NO_KERNELS, STOCK = "--factory llama3_8b_e8t2", "--factory llama3_8b trainer.max_step=3"


@pytest.mark.parametrize("typed", LLM_MISTAKES)
def test_nemo_llm_pretrain_checks_this_packages_recipes_the_same_way(
    typed: str, answers: dict[str, Answer], files: Path
) -> None:
    answer = answers[f"llm pretrain {typed} --yes"]
    assert answer.status == 2, answer.text
    assert LLM_MISTAKES[typed].replace("FILES", str(files)) in answer.text
    assert len(answer.text.splitlines()) <= 3, answer.text
    assert answer.written == []


def test_a_model_with_missing_kernels_is_refused_with_the_fix(answers: dict[str, Answer]) -> None:
    answer = answers[f"llm pretrain {NO_KERNELS} --yes"]
    assert answer.status == 2, answer.text
    assert "Transformer Engine: got not installed" in answer.text
    assert "model.config.apply_rope_fusion=False" in answer.text


def test_nemos_own_recipes_are_left_to_nemo(answers: dict[str, Answer]) -> None:
    answer = answers[f"llm pretrain {STOCK} --yes"]
    assert answer.status == 1
    assert "No parameter named 'max_step'" in answer.text


def _on_tiny_parent(files: Path, folder: Path) -> list[str]:
    """Return a command whose one mistake, one text in all splits, is found when the texts are read."""
    sizes = [f"pretrain.model.config.{name}={value}" for name, value in SIZES.items()]
    data = [f"pretrain.data.seq_length={SEQUENCE}", f"data={files}/same.yaml"]
    command = ["upcycle", "pipeline", *DEMO.split(), f"dir={folder}", f"dense={files}/tiny", "dense_ct=None"]
    return [*command, *sizes, *data, "--yes"]


def test_a_mistake_found_inside_a_stage_is_the_last_line_and_status_2(files: Path, tmp_path: Path) -> None:
    command = _on_tiny_parent(files, tmp_path / "run")
    ((answer,),) = run_ranks(type_commands, 1, [command], str(tmp_path), str(files), process_group=False)
    assert answer.status == 2, answer.text
    last = answer.text.splitlines()[-1]
    assert last.startswith("[data] source mine: got ")
    assert "expected more than a sequence" in last
    assert "Traceback" not in answer.text
    assert not (tmp_path / "run/upcycle").exists()
    other = [word.replace("/tiny", "/other") for word in command]
    ((answer,),) = run_ranks(type_commands, 1, [other], str(tmp_path), str(files), process_group=False)
    assert answer.status == 2, answer.text
    assert "work started from other inputs (stage import has other settings)" in answer.text
    assert answer.written == []


def test_jobs_that_run_are_watched_whatever_space_is_left(files: Path, tmp_path: Path) -> None:
    """A run that no disk holds; what stands for Slurm's commands takes jobs, and says that all of them run."""
    programs, run_dir = tmp_path / "bin", tmp_path / "run"
    answers = {
        "sbatch": "",
        "scontrol": "ClusterName = c",
        "squeue": "".join(f"{number}|RUNNING|None|a|n1\n" for number in range(len(BY_NAME))),
    }
    for name, text in answers.items():
        programs.mkdir(exist_ok=True)
        (programs / name).write_text(f"#!/bin/bash\necho -n '{text}'\n")
        (programs / name).chmod(0o755)
    endless = ("trainer.max_steps=1000000000", "log.ckpt.every_n_train_steps=1", "log.ckpt.keep_last=1000000000")
    command = [*_on_tiny_parent(files, run_dir), *SLURM.split(), *(f"pretrain.{word}" for word in endless)]
    command += ["run.executor.shared_dir=true", "--detach"]
    arguments = (str(tmp_path), str(files), str(programs))
    ((refused,),) = run_ranks(type_commands, 1, [command], *arguments, process_group=False)
    assert refused.status == 2, refused.text
    assert f"disk space for {run_dir} in {tmp_path}: got " in refused.text
    jobs = {name: str(number) for number, name in enumerate(BY_NAME)}
    write_json(run_dir / JOBS, {"cluster": "Slurm, cluster c", "jobs": jobs})
    ((watched,),) = run_ranks(type_commands, 1, [command], *arguments, process_group=False)
    assert watched.status == 0, watched.text
    assert f"Submitted to the queue: {' '.join(jobs.values())}." in watched.text


def test_a_second_run_in_the_same_folder_is_refused_and_leaves_the_plan(files: Path, tmp_path: Path) -> None:
    command = _on_tiny_parent(files, tmp_path / "run")
    with in_use(tmp_path / "run"):
        ((answer,),) = run_ranks(type_commands, 1, [command], str(tmp_path), str(files), process_group=False)
    assert answer.status == 2, answer.text
    assert f"{tmp_path / 'run'}: got in use by another run" in answer.text
    assert answer.written == []


def test_ctrl_c_during_the_checks_ends_them_at_once(files: Path, tmp_path: Path) -> None:
    """The blend is a pipe that nobody writes to, so the checks never end."""
    os.mkfifo(tmp_path / "slow.yaml")
    command = _on_tiny_parent(files, tmp_path / "run")
    command[command.index(f"data={files}/same.yaml")] = f"data={tmp_path}/slow.yaml"
    arguments = ([command], str(tmp_path), str(files))
    process = server().Process(target=type_commands, args=arguments)
    process.start()
    with held_by_reader(tmp_path / "slow.yaml"):
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(HANG_S)
    assert process.exitcode == -signal.SIGINT
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("typed", "answer"),
    [(f"{DEMO} dense=/nope", "model '/nope'"), ("dense=/mine recipe=mine:config", "argument 'recipe=mine:config'")],
)
def test_the_command_answers_as_a_process_of_its_own(typed: str, answer: str, tmp_path: Path) -> None:
    """Import of NeMo included, where it is needed; `python -m benchmarks.answers` measures how long that takes."""
    done = run([NEMO, "upcycle", "pipeline", *typed.split(), "--yes"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"Error: {answer}")
