"""vLLM and SGLang treat every target class as `conf/compatibility` says."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import open_dense
from nemo_upcycle.convert.offline import convert
from tests.compatibility import check, written
from tests.loading.cases import PARENTS
from tests.servers.models import CASES, COUNT, MODELS, TYPES, clear_prompt, spec_of


#: The engine in this environment.
ENGINE = next((name for name in ("vllm", "sglang") if find_spec(name)), None)
pytestmark = pytest.mark.skipif(ENGINE is None, reason="`make test-in ENV=vllm` and `ENV=sglang` have one each")
Parents = dict[tuple[str, bool], tuple[Path, list[int], list[int]]]
#: vLLM's attention on a CPU needs heads with 32 numbers or more.
SIZES = {"layers": 2, "head_dim": 32, "hidden_size": 128}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Parents:
    """Small random parents, each with a prompt and a continuation that the server gives in float32 and BF16."""
    made = {}
    for parent, tied in MODELS:
        folder = PARENTS[parent](tmp_path_factory.mktemp(parent) / "dense", tied=tied, **SIZES)
        made[parent, tied] = folder, *clear_prompt(folder)
    return made


def _greedy(folder: Path, dtype: str, prompt: list[int]) -> list[int]:
    engine: Any = import_module(f"tests.servers.{ENGINE}_cpu")
    return list(engine.greedy(folder, str(TYPES[dtype]).removeprefix("torch."), prompt, COUNT))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("parent", "tied"), MODELS)
def test_a_parent_gives_the_tokens_of_transformers(parents: Parents, parent: str, tied: bool, dtype: str) -> None:
    folder, prompt, wanted = parents[parent, tied]
    assert _greedy(folder, dtype, prompt) == wanted


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("parent", "tied", "name"), CASES)
def test_a_model_gives_its_parents_tokens(
    parents: Parents, tmp_path: Path, parent: str, tied: bool, name: str, dtype: str
) -> None:
    folder, prompt, wanted = parents[parent, tied]
    spec = spec_of(name, folder, tmp_path)
    with open_dense(folder) as source:
        done = convert(source, tmp_path / "moe", spec, dtype=TYPES[dtype], progress=False)
    try:
        result = "same" if _greedy(done.output, dtype, prompt) == wanted else "other"
    except AssertionError as error:
        if "Unsupported TP style" not in str(error):
            raise
        result = "refused"
    check({"vllm": "vLLM", "sglang": "SGLang"}[str(ENGINE)], written(done.output, TYPES[dtype].itemsize), result)
