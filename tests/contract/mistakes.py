"""What is typed behind `nemo`, and words of the answer, in NeMo and beside Megatron-Bridge.

FILES is a folder that `tests.contract.test_mistakes` fills.
"""

from __future__ import annotations


DEMO = "upcycle pipeline --factory smollm2_135m_e8t2"
LLM = "llm pretrain --factory smollm2_135m_e8t2"
SLURM = "run.executor=slurm run.executor.account=me run.executor.partition=a run.executor.container_image=null"
OF_NEMO = {
    # what is not there
    f"{DEMO} dense=/nope": "model '/nope' is no such folder",
    f"{DEMO} dense=asset://smollm2": "Did you mean 'smollm2-135m'?",
    f"{DEMO} dense=hf://nobody/nothing": "download of nobody/nothing from the Hugging Face hub is ",
    f"{DEMO} dense=FILES/parent": "pretrain.model.config.num_layers is 30; expected 4, as FILES/parent has",
    f"{DEMO} data=bogus": "blend 'bogus' does not exist. Valid: PATH.yaml, ",
    f"{DEMO} data=FILES/not.yaml": "expected valid YAML",
    f"{DEMO} evaluation=dmeo": "Did you mean 'demo'?",
    f"{DEMO} dir=FILES": "got a folder with a.txt, ",
    f"{DEMO} pretrain=wrong_recipe.mine": "FILES/wrong_recipe.py, line 2 is NameError: name 'llm' is not defined",
    f"{DEMO} dir=/dev/null/x": "/dev/null is a file; expected a writable folder",
    # values
    f"{DEMO} pretrain.trainer.num_nodes=2": "pretrain.trainer.num_nodes is 2; expected 1 on this machine",
    f"{DEMO} pretrain.resume.restore_config.spec=None": "expected an UpcycleSpec",
    f"{DEMO} dir=a dir=b --dryrun": "argument 'dir' is a and b; expected one value",
    # clusters
    f"{DEMO} run.executor=slrum": "Did you mean 'slurm'?",
    f"{DEMO} run.executor=slurm": "run.executor.account is nothing; expected the account that jobs are charged to",
    f"{DEMO} --render FILES/rendered": "--render is no cluster; expected run.executor=slurm|kubernetes",
    f"{DEMO} {SLURM} --render FILES/not.yaml": "--render FILES/not.yaml is File exists; expected a writable folder",
    f"{DEMO} --detach": "expected Slurm",
    # names and values of settings
    f"{DEMO} pretrain.trainer.max_step=3": "Did you mean 'pretrain.trainer.max_steps'?",
    f"{DEMO} pretrian.trainer.max_steps=3": "Did you mean 'pretrain'?",
    f"{DEMO} daat=text": "Did you mean 'data'?",
    f"{DEMO} pretrain.trainer.max_steps=many": "max_steps' is 'many'; expected int. Write, for example, ",
    f"{DEMO} dir=": "argument 'dir=' is no value",
    # the command itself
    "upcycle pipeline --factory smollm2_135m_e8t3": "Did you mean 'smollm2_135m_e8t2'?",
    "upcycle pipeline --factory qwen35_4b_e8t2": "got a recipe for Megatron-Bridge alone; expected a recipe for NeMo",
    "llm pretrain --factory qwen35_4b_e8t2": "type `nemo upcycle pipeline --factory qwen35_4b_e8t2 --dryrun`",
    "upcycle pipeline --factory smollm2_135m_e8t2(processs=2)": "Did you mean 'processes'?",
    "upcycle pipeline dir=FILES/new": "no dense, no pretrain",
    f"{DEMO} --dryrn": "Did you mean '--dryrun'?",
    f"{DEMO} --yaml FILES/key.yaml": "'flies'",
    "upcycle ablate --grid FILES/grid.yaml dir=FILES/new": "llama_1m_e8t2",
    "upcycle ablate --grid laptop dir=FILES/new dense=/nope data=bogus --dryrun": "2 mistakes:\n  model '/nope': ",
    "upcycle ablate --grid FILES/untried.yaml dir=FILES/new --dryrun": "untried: arms.moe: the training cannot be",
    # a part of the chain
    f"{DEMO} --until pretrian": "--until: stage 'pretrian' does not exist. Did you mean 'pretrain'?",
    f"{DEMO} --until": "--until is no value",
    f"{DEMO} --from=pretrain --until=data": "--until is data; expected a stage from pretrain on",
    f"{DEMO} --from upcycle": "stage 'import' in",
    # NeMo's own command
    f"{LLM} resume.restore_config.spec.top_k=9": "top_k is 9",
    "llm pretrain --factory wrong_import.mine": "FILES/wrong_import.py, line 1 is ModuleNotFoundError: No module ",
    "llm pretrain --factory llama3_8b_e8t2(data='/nope') --dryrun": "data folder /nope is ",
    f"{LLM}(data='FILES/blend',dense='FILES/parent') data.seq_length=16 trainer.max_steps=2 data.dense=FILES/other": (
        "tokenizer of FILES/blend is sha256 "
    ),
    "llm pretrain --factory llama3_8b_e8t2": "model.config cannot be constructed on this machine: ValueError: ",
}
SMALL = "smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config"
DENSE_CT = "tests.bridge.recipes:tiny_dense_ct"
GIVEN = "upcycle pipeline dense=FILES/parent data=FILES/blend evaluation=FILES/evaluation.yaml dir=run"
TINY = f"{GIVEN} recipe=tests.bridge.recipes:tiny gpus=2"
OF_BRIDGE = {
    f"{GIVEN} recipe={SMALL[:-6]}cfg": f"recipe '{SMALL[:-6]}cfg' does not exist. Did you mean '{SMALL}'?",
    f"{GIVEN} recipe=tests.bridge.recipes:tini gpus=2": "recipe is tests.bridge.recipes:tini,",
    f"{GIVEN} recipe=tests.bridge.recipes:_tiny gpus=2": "recipe is tests.bridge.recipes:_tiny,",
    f"{GIVEN} recipe=tests.bridge.recipes:random gpus=2": "recipe tests.bridge.recipes:random is ",
    f"{GIVEN} recipe={DENSE_CT} gpus=2": f"recipe is {DENSE_CT},",
    f"{TINY} dense_ct=tests.bridge.recipes:moe": "dense_ct is tests.bridge.recipes:moe,",
    f"{GIVEN} recipe=own:of_two gpus=1": "recipe own:of_two is 2 parents: FILES/parent, FILES/another,",
    f"{GIVEN} recipe=tests.bridge.recipes:tiny": "gpus is None,",
    f"{GIVEN} recipe=tests.bridge.recipes:tiny gpus=16": "gpus is 16 ",
    f"{GIVEN} recipe=tests.bridge.recipes:tiny gpus=3": "pretrain.model.expert_model_parallel_size is 2,",
    f"{TINY} pretrain.train.train_itres=4": "train.train_itres=4: ",
    f"{TINY} pretrain.train.train_iters=few": "train.train_iters is 'few',",
    f"{TINY} pretrain.dataset.seq_length=32": "pretrain.model.seq_length is 64,",
    f"{TINY} pretrain.spec.router_int=zero": "Did you mean 'router_init'",
    f"{TINY} pretrain.upcycling.seed=many": "pretrain.upcycling.seed is 'many'; expected a whole number",
    f"{TINY} dense_ct.train.train_iters=4": "dense_ct.train.train_iters=4 is ",
    f"{TINY} pretrain.checkpoint.save=/elsewhere": "checkpoint.save is checkpoint.save=/elsewhere,",
    f"{TINY} gpus_per_node=0": "gpus_per_node is 0,",
    f"{TINY} --detach": "--detach is ",
    f"{TINY} --render out": "--render is ",
    f"{TINY} recip=x": "'recip'",
    "upcycle pipeline --factory llama32_1b_e8t2_sft dir=run": "got a recipe for NeMo alone; expected a recipe for",
    f"{TINY} --from evaluate": "",
    TINY.replace("FILES/parent", "/nope"): "model '/nope' is ",
    TINY.replace("FILES/blend", "/nope"): "blend '/nope'",
    TINY.replace("FILES/evaluation.yaml", "dmo"): "'dmo' does not exist. Did you mean 'demo'?",
    # a parent that is fetched before it can be opened
    f"{DEMO} pretrain.train.train_itres=4 dir=run": "train.train_itres=4: ",
    f"upcycle pipeline dense=asset://smollm2-135m recipe={SMALL.replace('e8t2', 'dense_ct')} dir=run": (
        "recipe is smollm2_135m_dense_ct_"
    ),
    "upcycle ablate --grid FILES/grid.yaml dir=run": "arms.moe: spec: got",
    "upcycle ablate --grid mini dir=run --dryrun": "arms.dense: factory is llama_1m_dense_ct(dense='parent') ",
    "upcycle ablate --grid FILES/untried.yaml dir=run --dryrun": (
        "untried: arms.moe: the training cannot be constructed: ValueError: When using group limited routing"
    ),
}
