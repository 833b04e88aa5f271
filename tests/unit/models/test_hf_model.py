"""Folders saved by transformers 5 give the same results here, on every loading path."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nemo_upcycle.convert.hf_folder import write_config
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.evaluation import backends as evaluation
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.hf_model import empty_model, load_tokenizer
from nemo_upcycle.utils.files import read_json, write_json
from tests.folders import converted
from tests.models import LLAMA3_SCALING, as_transformers_5, hugging_face_logits, write_llama, write_tokenizer
from tests.parents import YARN, write_gemma3, write_granite4, write_olmo3


TOKENS_BS = torch.arange(200).view(1, -1)


@pytest.fixture(params=[None, LLAMA3_SCALING | {"original_max_position_embeddings": 64}], ids=["theta", "llama3"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A dense folder as transformers 5 saves it, and the logits of the original folder."""
    folder = tmp_path / "dense"
    write_tokenizer(write_llama(folder, vocab_size=259, layers=2, rope_theta=500000.0, rope_scaling=request.param))
    logits_BSV = _plain_logits(folder)
    as_transformers_5(folder)
    # transformers 4 misreads the folder silently.
    assert (_plain_logits(folder) - logits_BSV).abs().max() > 0.1
    return folder, logits_BSV


@torch.no_grad()
def _plain_logits(folder: Path) -> torch.Tensor:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS_BS).logits


def test_a_tokenizer_of_transformers_5_gives_the_same_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "new")
    folder = as_transformers_5(write_llama(tmp_path / "new", layers=1))
    tokenizer, before = load_tokenizer(folder), load_tokenizer(write_tokenizer(tmp_path / "old"))
    text = "some words <unk></s>"
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
    assert tokenizer.eos_token_id == before.eos_token_id == 258
    tokenizer.save_pretrained(tmp_path / "again")  # a finished blend also saves the tokenizer, for NeMo
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == before(text)["input_ids"]


@torch.no_grad()
def test_what_transformers_5_saved_computes_the_same_here(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, logits_BSV = saved
    model, _ = evaluation.load_model(folder)
    assert torch.equal(model(TOKENS_BS).logits, logits_BSV)
    assert torch.equal(hugging_face_logits(folder, TOKENS_BS), logits_BSV)
    moe = converted(folder, tmp_path / "moe").output
    assert verify(folder, moe).equal
    assert (_plain_logits(moe) - logits_BSV).abs().max() < 1e-4
    written = tmp_path / "written"
    written.mkdir()
    write_config(folder, written, read_architecture(folder), torch.float32)
    shutil.copyfile(folder / "model.safetensors", written / "model.safetensors")
    assert torch.equal(_plain_logits(written), logits_BSV)


def _of_two_bases(folder: Path) -> Path:
    """Rewrite a Gemma 3's rotary settings in transformers 5's format, one entry for each kind of layer."""
    config = read_json(folder / "config.json")
    bases = {"full_attention": config.pop("rope_theta"), "sliding_attention": config.pop("rope_local_base_freq")}
    kinds = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    write_json(folder / "config.json", config | {"rope_parameters": kinds, "rope_scaling": None})
    return folder


def test_rotary_embeddings_of_layer_kinds_have_two_spellings(tmp_path: Path) -> None:
    folder = write_gemma3(tmp_path / "dense", rope_local_base_freq=3000.0)
    arch, tokens = read_architecture(folder), torch.arange(32).view(1, -1)
    wanted = hugging_face_logits(folder, tokens)
    assert (arch.rope_theta, arch.local_rope_theta) == (100000.0, 3000.0)
    assert read_architecture(_of_two_bases(folder)) == arch
    assert torch.equal(hugging_face_logits(folder, tokens), wanted)


@pytest.mark.parametrize("write", [partial(write_olmo3, rope_scaling=YARN), write_gemma3, write_granite4])
def test_an_empty_model_lacks_its_weights_alone(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path / "dense")
    model, tokens = empty_model(folder), torch.arange(32).view(1, -1)
    weights = load_file(folder / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights, assign=True)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, hugging_face_logits(folder, tokens))
