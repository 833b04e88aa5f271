"""Writes a Hugging Face folder: config, weights as streamed safetensors shards, tokenizer files of the parent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.architecture import Architecture
from nemo_upcycle.errors import CheckpointError, UpcycleError, problem
from nemo_upcycle.files import read_json, require_disk, write_json
from nemo_upcycle.hf_settings import ACTIVATIONS, both_ropes
from nemo_upcycle.progress import ProgressLine
from nemo_upcycle.sources.checks import require_finite
from nemo_upcycle.sources.safetensors_folder import INDEX
from nemo_upcycle.streamed import StreamedFile


MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
#: What travels with the weights unchanged: a tokenizer saved again by a newer library may not open in an older one.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def moe_config(dense_config: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """Return the `config.json` of an upcycled model: the parent's settings, plus what the experts need.

    Special tokens and the like are kept as they are. What decides the function is written always, as transformers 4
    and 5 read it: where the parent's config says nothing, its class and that of the MoE may have other defaults.
    """
    dropped = ("attention_bias", "mlp_bias", "hidden_activation")
    config = {key: value for key, value in dense_config.items() if key not in dropped}
    common = {
        "architectures": [arch.hf_class],
        "num_experts_per_tok": arch.top_k,
        "head_dim": arch.head_dim,
        "num_key_value_heads": arch.num_kv_heads,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied_embeddings,
        "hidden_act": next(name for name, kind in ACTIVATIONS.items() if kind == arch.activation),
        "max_position_embeddings": arch.max_positions,
        "output_router_logits": False,
    }
    if arch.hf_class == "MixtralForCausalLM":
        own: dict[str, Any] = {
            "model_type": "mixtral",
            "num_local_experts": arch.num_experts,
            "intermediate_size": arch.expert_ffn_size,
            "sliding_window": arch.sliding_window,
        }
    else:
        own = {
            "model_type": "qwen2_moe",
            "num_experts": arch.num_experts,
            "intermediate_size": arch.ffn_size,
            "moe_intermediate_size": arch.expert_ffn_size,
            "shared_expert_intermediate_size": arch.shared_ffn_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(arch.num_layers) if not arch.is_moe_layer(layer)],
            "norm_topk_prob": arch.norm_topk,
            "qkv_bias": arch.qkv_bias,
            "use_sliding_window": False,
        }
    return config | common | own | both_ropes(arch.rope_theta, arch.rope_scaling)


def require_dtype(dtype: torch.dtype) -> None:
    """Check that weights of this type can be written.

    Raises:
        UpcycleError: they cannot.
    """
    if dtype not in _DTYPE_NAMES:
        names = [str(one).removeprefix("torch.") for one in _DTYPE_NAMES]
        got, fix = str(dtype).removeprefix("torch."), f"add --dtype {names[0]}"
        raise UpcycleError(problem("type of the weights on disk", got=got, expected=" or ".join(names), fix=fix))


def shard_files(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[str]]:
    """Return which tensors go into which safetensors file, named as transformers names them."""
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size_bytes + tensor_bytes > max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes += tensor_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, start=1)
    }


def write_index(folder: Path, files: dict[str, list[str]], total_bytes: int) -> None:
    """Write which tensor lies in which file, if there are several."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def safetensors_header(names: list[str], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Return what stands before the data of a safetensors file, which holds the tensors one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        stop = offset + torch.Size(shapes[name]).numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text


def write_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    *,
    label: str = "export",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Stream tensors into safetensors shards, one tensor in memory at a time.

    Args:
        folder: an existing folder.
        shapes: every tensor's name and shape, in the order in which to write them.
        read: gives a tensor by its name.
        dtype: type on disk.
        label: what the progress line says.
        max_shard_bytes: largest size of a file.

    Returns:
        The bytes of the tensors.

    Raises:
        CheckpointError: a tensor has another shape than announced, or contains NaN, infinity or a number too large
            for the type.
        UpcycleError: the disk has no room.
    """
    total_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    require_disk(folder, total_bytes, "the exported weights")
    files = shard_files(shapes, dtype, max_shard_bytes)
    with ProgressLine(label, len(shapes)) as line:
        for file, names in files.items():
            with StreamedFile(folder / file) as out:
                out.write(safetensors_header(names, shapes, dtype))
                for name in names:
                    tensor = _checked(name, read(name), shapes[name], dtype)
                    out.write(tensor.view(torch.uint8).numpy().data)
                    line.advance()
    write_index(folder, files, total_bytes)
    return total_bytes


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as it lies on disk."""
    if tuple(tensor.shape) != shape:
        got, expected, fix = list(tensor.shape), list(shape), "check the checkpoint's config"
        raise CheckpointError(problem(f"shape of {name}", got=got, expected=expected, fix=fix))
    made = tensor.to(dtype).contiguous()
    require_finite(tensor, name, made=made)
    return made


def companions_of(dense_folder: Path) -> list[Path]:
    """Return the parent's tokenizer, chat template and generation settings."""
    return sorted({path for pattern in _COMPANIONS for path in dense_folder.glob(pattern) if path.is_file()})


def copy_companions(dense_folder: Path, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and generation settings of the parent, unchanged; return the names."""
    found = companions_of(dense_folder)
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]


def write_config(dense_folder: Path, folder: Path, arch: Architecture, dtype: torch.dtype) -> None:
    """Write the `config.json` of `arch`, made from the parent's."""
    config = read_json(dense_folder / "config.json")
    config = moe_config(config, arch) if arch.num_experts else config | both_ropes(arch.rope_theta, arch.rope_scaling)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config.pop("dtype", None)
    write_json(folder / "config.json", config)
