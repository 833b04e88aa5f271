"""Writes a small but real GGUF model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "Ġt h", "Ġth e", "a t", "Ġ Ġ"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 16


def write_gguf(path: Path, *, tied: bool = True) -> Path:
    """Write a two-layer Llama whose FFN is quantised."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_license, "apache-2.0"),
        (writer.add_languages, ["en"]),
        (writer.add_context_length, 128),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, FFN),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, KV_HEADS),
        (writer.add_vocab_size, len(TOKENS)),
        (writer.add_rope_freq_base, 100000.0),
        (writer.add_rope_dimension_count, HEAD_DIM),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, TOKENS),
        (writer.add_token_types, [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))),
        (writer.add_token_merges, MERGES),
        (writer.add_unk_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_add_bos_token, False),
        (writer.add_chat_template, "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    ):
        add(value)

    def add_tensor(name: str, *shape: int, quantised: bool = False) -> None:
        values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        if quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add_tensor("token_embd.weight", len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        add_tensor(f"{prefix}attn_norm.weight", HIDDEN)
        add_tensor(f"{prefix}ffn_norm.weight", HIDDEN)
        add_tensor(f"{prefix}attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add_tensor(f"{prefix}attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add_tensor(f"{prefix}attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add_tensor(f"{prefix}attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add_tensor(f"{prefix}ffn_gate.weight", FFN, HIDDEN, quantised=True)
        add_tensor(f"{prefix}ffn_up.weight", FFN, HIDDEN, quantised=True)
        add_tensor(f"{prefix}ffn_down.weight", HIDDEN, FFN, quantised=True)
    add_tensor("output_norm.weight", HIDDEN)
    if not tied:
        add_tensor("output.weight", len(TOKENS), HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
