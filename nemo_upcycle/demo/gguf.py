"""GGUF to a Hugging Face folder, for Llama models with a byte-level BPE tokenizer.

Only the `gguf` package reads the file, so the result does not depend on the GGUF support of any transformers release:
those differ in what they accept, in whether the result may be saved and in the tokenizer they rebuild.
Quantised weights are dequantised: the result is an ordinary float checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.families import llama
from nemo_upcycle.models.hf_config import both_ropes
from nemo_upcycle.sources.safetensors_folder import INDEX
from nemo_upcycle.utils.files import MARKER, output_folder, require_disk, write_json
from nemo_upcycle.utils.progress import ProgressLine


_DTYPE = torch.bfloat16
_SHARD_BYTES = 2 << 30  # what is held in memory at once
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_CONTROL_TOKEN = 3  # ggml's token type of special tokens
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def convert_gguf(gguf_path: Path, output: Path, base_model: str | None = None) -> Path:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, in bfloat16.

    Args:
        gguf_path: a `llama` model; any quantisation that `gguf` can undo.
        output: the folder that shall exist afterwards, complete with its success marker.
        base_model: name on the Hugging Face hub of the model in the file, for the card.

    Returns:
        `output`.

    Raises:
        CheckpointError: not a readable GGUF file, another architecture, a tensor or tokenizer this does not know.
        UpcycleError: the `gguf` package is missing, the disk is full.

    Example:
        >>> convert_gguf(fetch_asset("smollm2-135m"), Path("runs/demo/dense"))  # doctest: +SKIP
    """
    reader = _open(gguf_path)
    fields = _fields(reader, gguf_path)
    config = _config(fields, reader.tensors)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    require_disk(output, sum(map(_size_bytes, reader.tensors)), f"the model of {gguf_path.name}")
    with output_folder(output) as folder:
        write_json(folder / "config.json", config)
        _write_weights(reader.tensors, config, folder)
        _write_tokenizer(fields, folder)
        _write_card(fields, folder, gguf_path.name, base_model)
        special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
        write_json(folder / MARKER, {"source": gguf_path.name, "dtype": "bfloat16", "parameters": parameters})
    return output


def _write_card(fields: dict[str, Any], folder: Path, name: str, base_model: str | None) -> None:
    """Keep what the file says of licence and languages: it holds for whatever is made of the model."""
    known = {"base_model": base_model, "license": fields.get("general.license")}
    known["language"] = fields.get("general.languages")
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in known.items() if value)
    text = f"---\n{front}---\n\nThe weights of {name}, dequantised.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UpcycleError(
            "package gguf", got="not installed", expected="0.17 or newer", fix="pip install 'gguf>=0.17'"
        ) from None
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            str(path), got=f"unreadable ({error})", expected="a GGUF file", fix="fetch the file again"
        ) from None


def _fields(reader: Any, path: Path) -> dict[str, Any]:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama" or "llama.rope.scaling.type" in fields or "llama.expert_count" in fields:
        raise CheckpointError(
            f"architecture of {path.name}",
            got=(
                f"{architecture}, rope scaling {fields.get('llama.rope.scaling.type', 'none')}, "
                f"experts {fields.get('llama.expert_count', 0)}"
            ),
            expected="a dense llama without rope scaling",
            fix="convert this file with its own tools and give the Hugging Face folder",
        )
    return fields


def _config(fields: dict[str, Any], tensors: Any) -> dict[str, Any]:
    """Return the `config.json` of a Llama."""
    names = {tensor.name for tensor in tensors}
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    vocab_size = len(fields["tokenizer.ggml.tokens"])
    special = {
        f"{role}_token_id": fields[f"tokenizer.ggml.{key}_token_id"]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    return {
        "architectures": [llama.FAMILY.hf_class],
        "model_type": llama.FAMILY.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "max_position_embeddings": fields["llama.context_length"],
        # stored in single precision: 9.999999747378752e-06 is meant to be 1e-05
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        **both_ropes(float(fields.get("llama.rope.freq_base", 10000.0)), None),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "bfloat16",
        **special,
    }


def _target_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER_NAME.fullmatch(name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
    raise CheckpointError(
        "tensor of the GGUF file",
        got=name,
        expected=f"{', '.join(_OUTER)} or blk.N.({'|'.join(_LAYER)}).weight",
        fix="convert this file with its own tools and give the Hugging Face folder",
    )


def _read(tensor: Any, config: dict[str, Any]) -> torch.Tensor:
    """Dequantise one tensor and put the rows of the query and key projections in Hugging Face's order."""
    from gguf.quants import dequantize

    shape = [int(size) for size in reversed(tensor.shape)]
    array = dequantize(tensor.data, tensor.tensor_type)  # float32 tensors come as read-only views of the file
    values = torch.from_numpy(np.require(array, requirements="W")).reshape(shape)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    match = _LAYER_NAME.fullmatch(tensor.name)
    if match and match[2] in heads:
        # GGUF rotates neighbouring pairs of rows, Hugging Face the two halves of a head
        pairs = values.view(heads[match[2]], config["head_dim"] // 2, 2, shape[1])
        values = pairs.transpose(1, 2).reshape(shape)
    return values.to(_DTYPE)


def _size_bytes(tensor: Any) -> int:
    return int(tensor.n_elements) * _DTYPE.itemsize


def _shards(tensors: Any) -> Iterator[list[Any]]:
    """Group the tensors so that each group takes at most `_SHARD_BYTES`, or is a single larger tensor."""
    group: list[Any] = []
    for tensor in tensors:
        if group and sum(map(_size_bytes, [*group, tensor])) > _SHARD_BYTES:
            yield group
            group = []
        group.append(tensor)
    yield group


def _write_weights(tensors: Any, config: dict[str, Any], folder: Path) -> None:
    """Write the safetensors, one shard in memory at a time, and their index where there are several."""
    shards = list(_shards(tensors))
    count, index = len(shards), {}
    with ProgressLine("dequantise", total=len(tensors)) as progress:
        for number, group in enumerate(shards, 1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            weights = {}
            for tensor in group:
                weights[_target_name(tensor.name)] = _read(tensor, config)
                progress.advance()
            index.update(dict.fromkeys(weights, file))
            save_file(weights, folder / file, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / file)  # safetensors makes files only their owner may read
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(map(_size_bytes, tensors))}, "weight_map": index})


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write the files of a byte-level BPE of the SmolLM family, chat template included.

    No token is added at either end of a text, so that `decode(encode(text)) == text`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise CheckpointError(
            "tokenizer of the GGUF file",
            got=f"model {model}, pre-tokenizer {pre}",
            expected="model gpt2, pre-tokenizer smollm",
            fix="give the model as a Hugging Face folder that holds its own tokenizer files",
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # the tag `smollm` stands for this pair: without Digits, blanks before a number are split another way
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_tokenizer_settings(fields, special, folder)


def _write_tokenizer_settings(fields: dict[str, Any], special: list[str], folder: Path) -> None:
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in _ROLES.items()}
    roles = {role: tokens[number] for role, number in ids.items() if number is not None}
    settings = {
        **roles,
        "additional_special_tokens": [token for token in special if token not in roles.values()],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # Llama's forward refuses token_type_ids
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # every transformers release knows this one
    }
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", roles)
