from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


QUESTIONS = [
    {"question": "What is 1 + 1?", "choices": ["1", "2", "three", "10"], "answer": 1, "subject": "arithmetic"},
    {"question": "Which is a fruit?", "choices": ["stone", "pear", "iron", "sand"], "answer": 1, "subject": "botany"},
    {"question": "Which is wet?", "choices": ["fire", "ash", "dust", "rain"], "answer": 3, "subject": "weather_now"},
]
DOCUMENTS = [
    ("first", "The state of the union is measured here.\n\nIt is long enough to be cut into some windows of text."),
    ("second", "Another speech, with an é that takes two bytes."),
]


def write_tokenizer(folder: Path, *, adds_bos: bool) -> None:
    """Write a tokenizer with one token a byte, and with <s> as token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost a tiny model far more than they bring, on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with random weights, large enough that its answers differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, adds_bos=False)
    return folder
