"""Map each mistaken command (the words after `nemo`) to words of its answer, in NeMo and in Megatron-Bridge.

FILES is a placeholder for the folder that `tests.contract.test_mistakes` fills.
"""

from __future__ import annotations


DEMO = "upcycle pipeline --factory smollm2_135m_e8t2"
LLM = "llm pretrain --factory smollm2_135m_e8t2"
SLURM = "run.executor=slurm run.executor.account=me run.executor.partition=a run.executor.container_image=null"
OF_NEMO = {
    # missing inputs
    f"{DEMO} dense=/nope": "No model folder /nope. ",
    f"{DEMO} dense=asset://smollm2": "Did you mean 'smollm2-135m'?",
    f"{DEMO} dense=hf://nobody/nothing": "Download of nobody/nothing from the Hugging Face hub failed (",
    f"{DEMO} dense=FILES/parent": "pretrain.model.config.num_layers is 30; expected 4, as in FILES/parent",
    f"{DEMO} data=bogus": "blend 'bogus' does not exist. Valid: PATH.yaml, ",
    f"{DEMO} data=FILES/not.yaml": "is not valid YAML: ",
    f"{DEMO} evaluation=dmeo": "Did you mean 'demo'?",
    f"{DEMO} dir=FILES": "has other files: a.txt, ",
    f"{DEMO} pretrain=wrong_recipe.mine": "FILES/wrong_recipe.py, line 2 raises NameError: name 'llm' is not defined",
    f"{DEMO} dir=/dev/null/x": "/dev/null is a file. Choose another dir.",
    # invalid values
    f"{DEMO} pretrain.trainer.num_nodes=2": "pretrain.trainer.num_nodes is 2; expected 1 on this machine",
    f"{DEMO} pretrain.resume.restore_config.spec=None": "restore_config.spec is missing, and the stage upcycles",
    f"{DEMO} dir=a dir=b --dryrun": "Argument 'dir' is given twice: a and b",
    # clusters
    f"{DEMO} run.executor=slrum": "Did you mean 'slurm'?",
    f"{DEMO} run.executor=slurm": "run.executor.account is missing: the account that jobs are charged to",
    f"{DEMO} --render FILES/rendered": "--render needs a cluster. Add run.executor=slurm or run.executor=kubernetes.",
    f"{DEMO} {SLURM} --render FILES/not.yaml": "--render FILES/not.yaml cannot be written: File exists",
    f"{DEMO} --detach": "--detach needs a cluster's executor (Slurm",
    # names and values of settings
    f"{DEMO} pretrain.trainer.max_step=3": "Did you mean 'pretrain.trainer.max_steps'?",
    f"{DEMO} pretrian.trainer.max_steps=3": "Did you mean 'pretrain'?",
    f"{DEMO} daat=text": "Did you mean 'data'?",
    f"{DEMO} pretrain.trainer.max_steps=many": "max_steps' is 'many'; expected int. Write, for example, ",
    f"{DEMO} dir=": "Argument 'dir=' is not NAME=VALUE",
    # the command itself
    "upcycle pipeline --factory smollm2_135m_e8t3": "Did you mean 'smollm2_135m_e8t2'?",
    "upcycle pipeline --factory qwen35_4b_e8t2": "is only for Megatron-Bridge, and this environment has NeMo",
    "llm pretrain --factory qwen35_4b_e8t2": "Type `nemo upcycle pipeline --factory qwen35_4b_e8t2 --dryrun`",
    "upcycle pipeline --factory smollm2_135m_e8t2(processs=2)": "Did you mean 'processes'?",
    "upcycle pipeline dir=FILES/new": "Arguments are missing: dense, pretrain",
    f"{DEMO} --dryrn": "Did you mean '--dryrun'?",
    f"{DEMO} --yaml FILES/key.yaml": "'flies'",
    "upcycle ablate --grid FILES/grid.yaml dir=FILES/new": "llama_1m_e8t2",
    "upcycle ablate --grid laptop dir=FILES/new dense=/nope data=bogus --dryrun": "2 mistakes:\n  No model folder",
    "upcycle ablate --grid FILES/untried.yaml dir=FILES/new --dryrun": "untried: arms.moe: the training cannot be",
    # --from and --until, which run only a part of the chain
    f"{DEMO} --until pretrian": "--until: stage 'pretrian' does not exist. Did you mean 'pretrain'?",
    f"{DEMO} --until": "--until has no value",
    f"{DEMO} --from=pretrain --until=data": "--until is data; expected pretrain or a later stage",
    f"{DEMO} --from upcycle": "Stage 'import' in",
    # NeMo's own command
    f"{LLM} resume.restore_config.spec.top_k=9": "top_k is 9",
    "llm pretrain --factory wrong_import.mine": "FILES/wrong_import.py, line 1 raises ModuleNotFoundError: No module ",
    "llm pretrain --factory llama3_8b_e8t2(data='/nope') --dryrun": "Data folder /nope is not finished",
    f"{LLM}(data='FILES/blend',dense='FILES/parent') data.seq_length=16 trainer.max_steps=2 data.dense=FILES/other": (
        "Tokenizer of FILES/blend is "
    ),
    "llm pretrain --factory llama3_8b_e8t2": "model.config cannot be constructed on this machine: ValueError: ",
}
SMALL = "smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config"
DENSE_CT = "tests.bridge.recipes:tiny_dense_ct"
GIVEN = "upcycle pipeline dense=FILES/parent data=FILES/blend evaluation=FILES/evaluation.yaml dir=run"
TINY = f"{GIVEN} recipe=tests.bridge.recipes:tiny gpus=2"
OF_BRIDGE = {
    f"{GIVEN} recipe={SMALL[:-6]}cfg": f"recipe '{SMALL[:-6]}cfg' does not exist. Did you mean '{SMALL}'?",
    f"{GIVEN} recipe=tests.bridge.recipes:tini gpus=2": "recipe tests.bridge.recipes:tini cannot be called",
    f"{GIVEN} recipe=tests.bridge.recipes:_tiny gpus=2": "recipe tests.bridge.recipes:_tiny cannot be called",
    f"{GIVEN} recipe=tests.bridge.recipes:random gpus=2": "bridge.recipes:random starts from random",
    f"{GIVEN} recipe={DENSE_CT} gpus=2": f"recipe is {DENSE_CT}; expected a recipe that upcycles",
    f"{TINY} dense_ct=tests.bridge.recipes:moe": "recipes:moe; expected a recipe of a dense baseline",
    f"{GIVEN} recipe=own:of_two gpus=1": "Recipe own:of_two has 2 parents (FILES/parent, FILES/another): ",
    f"{GIVEN} recipe=tests.bridge.recipes:tiny": "gpus is missing, and the recipe ",
    f"{GIVEN} recipe=tests.bridge.recipes:tiny gpus=16": "is 16, more than one machine",
    f"{GIVEN} recipe=tests.bridge.recipes:tiny gpus=3": "pretrain.model.expert_model_parallel_size is 2; ",
    f"{TINY} pretrain.train.train_itres=4": "train.train_itres=4: ",
    f"{TINY} pretrain.train.train_iters=few": "train.train_iters is 'few'; ",
    f"{TINY} pretrain.dataset.seq_length=32": "pretrain.model.seq_length is 64; ",
    f"{TINY} pretrain.spec.router_int=zero": "Did you mean 'router_init'",
    f"{TINY} pretrain.upcycling.seed=many": "pretrain.upcycling.seed is 'many'; expected a whole number",
    f"{TINY} dense_ct.train.train_iters=4": "dense_ct.train.train_iters=4 changes the dense baseline",
    f"{TINY} pretrain.checkpoint.save=/elsewhere": "checkpoint.save cannot be set",
    f"{TINY} gpus_per_node=0": "gpus_per_node is 0; ",
    f"{TINY} --detach": "--detach needs ",
    f"{TINY} --render out": "--render needs ",
    f"{TINY} recip=x": "'recip'",
    "upcycle pipeline --factory llama32_1b_e8t2_sft dir=run": "is only for NeMo, and this environment has ",
    f"{TINY} --from evaluate": "",
    TINY.replace("FILES/parent", "/nope"): "No model folder /nope. ",
    TINY.replace("FILES/blend", "/nope"): "blend '/nope'",
    TINY.replace("FILES/evaluation.yaml", "dmo"): "'dmo' does not exist. Did you mean 'demo'?",
    # a parent that must be downloaded before it can be opened
    f"{DEMO} pretrain.train.train_itres=4 dir=run": "train.train_itres=4: ",
    f"upcycle pipeline dense=asset://smollm2-135m recipe={SMALL.replace('e8t2', 'dense_ct')} dir=run": (
        "recipe is smollm2_135m_dense_ct_"
    ),
    "upcycle ablate --grid FILES/grid.yaml dir=run": "arms.moe: spec",
    "upcycle ablate --grid mini dir=run --dryrun": "(dense='parent') needs a trainer",
    "upcycle ablate --grid FILES/untried.yaml dir=run --dryrun": (
        "untried: arms.moe: the training cannot be constructed: ValueError: When using group limited routing"
    ),
}
