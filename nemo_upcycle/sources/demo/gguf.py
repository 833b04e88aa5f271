"""Convert the demo's model, a Llama in GGUF with a byte-level BPE tokenizer, to a Hugging Face folder.

Only the `gguf` package reads the file, so the result does not depend on the GGUF support of a transformers release.
transformers releases differ in which files they accept, whether they can save the result, and which tokenizer they
rebuild. Quantised weights are dequantised, so the result is an ordinary float checkpoint. The file is an asset with a
known hash, so its contents are not checked here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.families import llama
from nemo_upcycle.models.hf_config import both_ropes
from nemo_upcycle.utils.files import MARKER, output_folder, require_disk, write_json
from nemo_upcycle.utils.progress import track
from nemo_upcycle.utils.writers import plain, yaml_text


_DTYPE = torch.bfloat16
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
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
_TENSOR_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")
_CONTROL_TOKEN = 3  # ggml's token type of special tokens
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def convert_gguf(gguf_path: Path, output: Path, base_model: str | None) -> Path:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, in bfloat16.

    Args:
        gguf_path: the asset's dense `llama` model with a tied embedding and SmolLM's tokenizer.
        output: folder to create, including its success marker.
        base_model: name of the file's model on the Hugging Face hub, for the model card.

    Returns:
        `output`.

    Raises:
        UpcycleError: the `gguf` package is missing, or the disk is full.

    Example:
        >>> convert_gguf(fetch_asset("smollm2-135m"), Path("runs/demo/dense"), "org/name")  # doctest: +SKIP
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UpcycleError(
            "Package gguf", kind="missing", got="is not installed", fix="run: pip install 'gguf>=0.17'"
        ) from None
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    require_disk(output, parameters * _DTYPE.itemsize, f"the model of {gguf_path.name}")
    with output_folder(output) as folder:
        write_json(folder / "config.json", config)
        tensors = track(reader.tensors, "dequantise", len(reader.tensors))
        weights = dict(_converted(tensor, config) for tensor in tensors)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # so that other users can read it
        _write_tokenizer(fields, folder)
        _write_card(fields, folder, gguf_path.name, base_model)
        special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
        write_json(folder / MARKER, {"source": gguf_path.name, "dtype": "bfloat16", "parameters": parameters})
    return output


def _write_card(fields: dict[str, Any], folder: Path, name: str, base_model: str | None) -> None:
    """Write a model card with the file's licence and languages, which apply to all models made from the file."""
    known = {"base_model": base_model, "license": fields["general.license"], "language": fields["general.languages"]}
    text = f"---\n{yaml_text(known)}---\n\nThe weights of {plain(name)}, dequantised.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a Llama."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": [llama.FAMILY.hf_class],
        "model_type": llama.FAMILY.model_type,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        # the file stores single precision, so 9.999999747378752e-06 means 1e-05
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        **both_ropes(float(fields["llama.rope.freq_base"]), None),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _converted(tensor: Any, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Return a tensor's name and dequantised values, with query and key rows in Hugging Face's order."""
    from gguf.quants import dequantize

    ((layer, name),) = _TENSOR_NAME.findall(tensor.name)
    shape = [int(size) for size in reversed(tensor.shape)]
    array = dequantize(tensor.data, tensor.tensor_type)  # float32 tensors come as read-only views of the file
    values = torch.from_numpy(np.require(array, requirements="W")).reshape(shape)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if name in heads:
        # GGUF rotates pairs of neighbouring rows. In Hugging Face, a pair has one row from each half of a head.
        pairs = values.view(heads[name], config["head_dim"] // 2, 2, shape[1])
        values = pairs.transpose(1, 2).reshape(shape)
    prefix = f"model.layers.{layer}." if layer else ""
    return f"{prefix}{_NAMES[name]}.weight", values.to(_DTYPE)


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write the files of a byte-level BPE tokenizer of the SmolLM family, including the chat template.

    No token is added at either end of a text, so that `decode(encode(text)) == text`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # GGUF's tag `smollm` means these two steps. Without Digits, spaces before a number would be split differently.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {role: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for role, name in _ROLES.items()}
    settings = {
        **roles,
        "additional_special_tokens": [token for token in special if token not in roles.values()],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # Llama's forward refuses token_type_ids
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # every transformers release has this class
        "chat_template": fields["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", roles)
