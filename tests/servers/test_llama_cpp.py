"""llama.cpp treats every target class as `conf/compatibility` says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.data.tokenizers import open_tokenizer
from nemo_upcycle.models.hf_model import load_model
from nemo_upcycle.sources.fetch import import_dense
from nemo_upcycle.utils.files import read_json, write_json
from tests.compatibility import check, expected, written
from tests.loading.cases import PARENTS
from tests.servers.llama_cpp import HOME, NotServedError, chat, greedy
from tests.servers.models import CASES, COUNT, MIXED_IN_16_BITS, MODELS, TYPES, continuation, spec_of


pytestmark = pytest.mark.skipif(not (HOME / "llama.cpp").is_dir(), reason="run make test-in ENV=llama-cpp")
Parents = dict[tuple[str, bool], Path]
Tokens = Callable[[str, bool, str], list[int]]
PROMPT = [504, 3575, 282, 260, 3116]
#: Words of llama.cpp's converter for a model that it refuses: GLM's tokens, dense layers, an unknown class.
REFUSALS = (r"\[gMASK\]", "Can not map tensor", "is not supported")
RUNTIME = "llama.cpp"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's real model, whose tokenizer llama.cpp knows."""
    return import_dense("asset://smollm2-135m", tmp_path_factory.mktemp("smollm2") / "dense")


@pytest.fixture(scope="module")
def parents(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Parents:
    """Small random parents with the tokenizer of `smollm2`."""
    made = {}
    for parent, tied in MODELS:
        folder = tmp_path_factory.mktemp(parent) / "dense"
        PARENTS[parent](folder, tied=tied, layers=2, vocab_size=49152)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(smollm2 / name, folder / name)
        if (
            parent == "Granite 4"
        ):  # llama.cpp uses the experts' width for the network; in granite-4.0-micro, both widths are equal
            config = read_json(folder / "config.json")
            write_json(folder / "config.json", config | {"intermediate_size": config["shared_intermediate_size"]})
        made[parent, tied] = folder
    return made


@pytest.fixture(scope="module")
def wanted(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """The tokens of a parent in llama.cpp, in each type; in float32, transformers must give the same tokens."""

    @cache
    def tokens(parent: str, tied: bool, dtype: str) -> list[int]:
        dense, file = parents[parent, tied], tmp_path_factory.mktemp("gguf") / "dense.gguf"
        found = greedy(dense, file, dtype, PROMPT, COUNT)
        if dtype == "f32":
            assert found == continuation(load_model(dense, dtype=torch.float32).eval(), PROMPT)[0]
        return found

    return tokens


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("parent", "tied", "name"), CASES)
def test_a_model_gives_its_parents_tokens(
    parents: Parents, wanted: Tokens, tmp_path: Path, parent: str, tied: bool, name: str, dtype: str
) -> None:
    spec = spec_of(name, parents[parent, tied], tmp_path)
    with open_dense(parents[parent, tied]) as source:
        done = convert(source, tmp_path / "moe", spec, dtype=TYPES[dtype], progress=False)
    model = written(done.output, TYPES[dtype].itemsize)
    if dtype == "bf16" and name in MIXED_IN_16_BITS and expected(RUNTIME, model) != "refused":
        pytest.skip("its routers compute in 16 bits, where top-k mixes copies: docs/classes.md")
    try:
        got = greedy(done.output, tmp_path / "moe.gguf", dtype, PROMPT, COUNT)
        result = "same" if got == wanted(parent, tied, dtype) else "other"
    except NotServedError as error:
        if not any(re.search(words, str(error)) for words in REFUSALS):
            raise
        result = "refused"
    check(RUNTIME, model, result)


@pytest.mark.parametrize("dtype", TYPES)
def test_smollm2_gives_its_parents_tokens_and_chats(smollm2: Path, tmp_path: Path, dtype: str) -> None:
    with open_dense(smollm2) as source:
        convert(source, tmp_path / "moe", UpcycleSpec(), dtype=TYPES[dtype], progress=False)
    files = [tmp_path / "dense.gguf", tmp_path / "moe.gguf"]
    folders = (smollm2, tmp_path / "moe")
    wanted, got = (greedy(folder, file, dtype, PROMPT, 24) for folder, file in zip(folders, files, strict=True))
    assert len(wanted) == 24
    assert got == wanted
    answered, turns = (chat(file, 32, ["What is the capital of France?", "And of Italy?"]) for file in files)
    assert turns == answered
    messages: list[dict[str, str]] = []
    render = partial(open_tokenizer(tmp_path / "moe").apply_chat_template, add_generation_prompt=True)
    for turn in turns:
        messages.append({"role": "user", "content": turn["question"]})
        assert turn["prompt"] == render(messages, return_dict=False)
        assert turn["tokens"]
        messages.append({"role": "assistant", "content": turn["text"]})
    assert turns[0]["ended"]
