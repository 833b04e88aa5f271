"""An upcycled checkpoint gets the same answers as its dense parent: the check that an engineer trusts.

The reference is the parent in Hugging Face's own implementation, not the export. Export and evaluation read a
checkpoint through the same table of parameters, and could share a mistake. With copied experts, the upcycled model
computes the parent's function. `tests/unit/models/test_parents.py` tests the export.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.evaluation.megatron.chunks import layout_here, load_chunks
from nemo_upcycle.evaluation.megatron.generate import generate
from nemo_upcycle.evaluation.megatron.score import score
from nemo_upcycle.models.growth import growth_spec
from nemo_upcycle.models.hf_config import read_architecture
from tests.distributed.ranks import run_ranks
from tests.distributed.saved import save_upcycled
from tests.models import hugging_face_logits, sample_tokens, write_mistral, write_olmo2, write_phi3, write_qwen3
from tests.parents import (
    write_granite,
    write_granite_swa,
    write_mixtral,
    write_moe,
    write_olmo3,
    write_qwen3_moe,
    write_wrapped,
)
from tests.tiers import quick


SPEC = UpcycleSpec(num_experts=4, top_k=2)
VOCAB, LENGTH, MOST = 250, 24, 4
#: Number of tokens in each prompt, and number of tokens at which its continuation ends (`MOST` at the latest).
PROMPTS, ENDS = [12, 7, 9, 7, 20], [2, 3, 8, 1, 2]
LAYOUTS: list[tuple[int, dict[str, int]]] = [(1, {}), (2, {"tp": 2}), (2, {"ep": 2}), (2, {"pp": 2})]
PARENTS = {
    "qwen3": write_qwen3,  # norms of query and key, each with its own weights
    "mistral": lambda folder: write_mistral(folder, window=5),  # a window shorter than the texts and the prompts
    "olmo2": write_olmo2,  # norms over all heads, which tensor parallelism splits
    "phi3": lambda folder: write_phi3(folder, sliding_window=5),
    "mixtral": write_mixtral,  # already has experts; more are added
    "qwen3_moe": write_qwen3_moe,
    "qwen2_moe": partial(write_moe, kind="Qwen2Moe"),  # a shared expert with a gate
    "glm4_moe": partial(write_moe, kind="Glm4Moe"),  # biases for choosing experts, and a dense layer
    "flex_olmo": partial(write_moe, kind="FlexOlmo"),
    "olmo3": write_olmo3,  # norms over all heads, a window in some layers
    "llava": partial(write_wrapped, kind="Llava", tied=True),  # a text model inside a multimodal model
    "granite": write_granite,  # multipliers at both ends of a pipeline and in between
    "granite_swa": write_granite_swa,  # attention sinks
}


#: Parents that `make test` runs. They have windowed attention, experts, some dense layers, and multipliers.
DAILY = {"mistral", "mixtral", "glm4_moe", "granite"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in DAILY else pytest.mark.full) for name in PARENTS]
)
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, next to a checkpoint of the model that is upcycled from it."""
    folder = tmp_path_factory.mktemp(request.param)
    PARENTS[request.param](folder / "dense")
    dense = folder / "dense"
    run_ranks(save_upcycled, 2, str(dense), str(folder / "saved/weights"), _spec_of(dense), {"ep": 2})
    return dense


def _spec_of(parent: Path) -> UpcycleSpec:
    arch = read_architecture(parent)
    return growth_spec(arch, 8) if arch.num_experts else SPEC


def _texts() -> list[list[int]]:
    return sample_tokens(VOCAB, batch=5, length=LENGTH).tolist()


def _asked(parent: str, layout: dict[str, int]) -> tuple[list[list[float]], list[list[int]]]:
    """Return the log-likelihoods of texts, and continuations of their beginnings."""
    dense = Path(parent)
    chunks, arch = load_chunks(dense.parent / "saved", dense, _spec_of(dense), layout_here(**layout), torch.float32)
    scored = score(chunks, [(text, LENGTH - 1) for text in _texts()], vocab_size=arch.vocab_size)
    prompts = [text[:length] for text, length in zip(_texts(), PROMPTS, strict=True)]

    def ends(number: int, tokens: list[int]) -> bool:
        return len(tokens) == ENDS[number]

    written = generate(chunks, prompts, most=MOST, ends=ends, vocab_size=arch.vocab_size, batch_size=2)
    return [likelihoods for likelihoods, _ in scored], written


@pytest.mark.parametrize(("ranks", "layout"), quick(LAYOUTS, (2, {"pp": 2})), ids=str)
def test_a_checkpoint_scores_and_writes_as_its_parent_does(parent: Path, ranks: int, layout: dict[str, int]) -> None:
    likelihoods, written = run_ranks(_asked, ranks, str(parent), layout)[0]
    texts = torch.tensor(_texts())
    logits = hugging_face_logits(parent, texts)[:, :-1].log_softmax(dim=-1)
    expected = logits.gather(2, texts[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(likelihoods), expected, rtol=1e-5, atol=2e-5)
    for text, start, end, got in zip(texts, PROMPTS, ENDS, written, strict=True):
        follows = text[None, :start]
        for _ in range(min(end, MOST)):
            follows = torch.cat([follows, hugging_face_logits(parent, follows)[:, -1:].argmax(dim=-1)], dim=1)
        assert got == follows[0, start:].tolist()
