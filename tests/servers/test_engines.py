"""vLLM and SGLang treat every target class as `conf/compatibility` says."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_upcycle import open_dense
from nemo_upcycle.convert.offline import convert
from tests.compatibility import check, written
from tests.loading.cases import PARENTS
from tests.parents import write_wrapped
from tests.servers.models import CASES, COUNT, MODELS, TYPES, clear_prompt, save_qwen3_processor, spec_of


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


@pytest.mark.skipif(ENGINE != "vllm", reason="the other server was not tried with pictures")
@pytest.mark.skipif(find_spec("torchvision") is None, reason="no torchvision fits this build of torch")
def test_a_model_that_sees_gives_its_parents_tokens(tmp_path: Path) -> None:
    from tests.servers.vllm_cpu import greedy

    axes = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    dense = write_wrapped(tmp_path / "dense", "Qwen3VL", head_dim=32, rope_scaling=axes)
    prompt = save_qwen3_processor(dense)
    with open_dense(dense) as source:
        done = convert(source, tmp_path / "moe", spec_of("plain", dense, tmp_path), progress=False)
    picture = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    text, seen, other = (
        [greedy(folder, "float32", [5, 17, 44, 101, 77], COUNT) for folder in (dense, done.output)],
        [greedy(folder, "float32", prompt, COUNT, picture) for folder in (dense, done.output)],
        greedy(done.output, "float32", prompt, COUNT, 255 - picture),
    )
    assert seen[1] != other  # the picture changes the answer
    result = "same" if text[0] == text[1] and seen[0] == seen[1] else "other"
    check("vLLM", written(done.output, 4), result)
