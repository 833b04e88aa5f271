"""The scripts of `examples/` as a user runs them, on a small parent; test_upcycled.py trains their recipes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.functional.tiny import SEQUENCE, SIZES, write_finished_inputs
from tests.functional.typed import Answer, type_commands
from tests.models import LLAMA3_SCALING, hugging_face_logits
from tests.tiers import quick


EXAMPLES = Path(__file__).parents[2] / "examples"
#: RoPE settings of Llama 3.2 1B.
ROTARY = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, tokenised texts, an evaluation, and a user's recipes where NeMo-Run looks for them."""
    folder = write_finished_inputs(tmp_path_factory.mktemp("inputs"), **ROTARY)
    shutil.copy(EXAMPLES / "own_recipe/my_recipes.py", folder / "workspace.py")
    return folder


def _upcycle(words: list[str], folder: str, is_alone: bool) -> Answer:
    if is_alone:  # started without torchrun
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    return type_commands([words], folder, folder)[0]


@pytest.mark.parametrize("ranks", quick([1, 2], 1))
def test_megatron_core_has_the_parents_loss(inputs: Path, ranks: int) -> None:
    words = [str(EXAMPLES / "megatron_core.py"), str(inputs / "parent"), "--expert-parallel", str(ranks)]
    answers = run_ranks(_upcycle, ranks, words, str(inputs), ranks == 1, process_group=False)
    tokens_BS = torch.randint(259, (2, 33), generator=torch.Generator().manual_seed(0))
    logits_BSV = hugging_face_logits(inputs / "parent", tokens_BS[:, :-1])
    wanted = float(torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten()))
    for rank, answer in enumerate(answers):
        assert answer.status == 0, answer.text
        assert re.search(rf"rank {rank}: [\d,]+ bytes read, [\d,]+ written, exact: True", answer.text), answer.text
        (loss,) = re.findall(rf"rank {rank}: loss (\d+\.\d+)", answer.text)
        assert float(loss) == pytest.approx(wanted, abs=1e-4)


def test_recipes_are_dry_run_and_say_what_they_changed(inputs: Path) -> None:
    sizes = {f"model.config.{name}": value for name, value in SIZES.items()}
    sizes |= {"data.seq_length": SEQUENCE, "data.global_batch_size": 16}  # two nodes of eight GPUs
    cut = [f"{name}={value}" for name, value in sizes.items()]
    dense = f"dense='{inputs / 'parent'}'"
    commands = [
        [str(EXAMPLES / "stock_nemo_recipe.py"), "--factory", f"stock_llama32_e8t2({dense})", *cut, "--dryrun"],
        ["llm", "pretrain", "--factory", f"my_recipes.llama32({dense},num_nodes=2)", *cut, "--dryrun"],
        ["llm", "pretrain", "--factory", f"my_llama32({dense})", *cut, "--dryrun"],
    ]
    chain = ["upcycle", "pipeline", "--factory", f"my_recipes.chain({dense})", f"data={inputs / 'blend'}"]
    chain += [f"{training}.{word}" for training in ("pretrain", "dense_ct") for word in cut]
    chain += [f"{training}.trainer.max_steps=3" for training in ("pretrain", "dense_ct")]
    commands.append([*chain, f"evaluation={inputs / 'evaluation.yaml'}", "--dryrun"])
    (answers,) = run_ranks(type_commands, 1, commands, str(inputs), str(inputs), process_group=False)
    for answer in answers:
        assert answer.status == (answer is answers[3]), (
            answer.text
        )  # this machine lacks resources that the chain needs
        assert "model.config.num_moe_experts: None -> 8" in answer.text
        assert answer.written == []
    for answer in answers[:3]:
        assert "Dry run for" in answer.text
    assert "It would not start:" in answers[3].text
