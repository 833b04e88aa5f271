"""Writes a Hugging Face folder: config, weights as streamed safetensors shards, tokenizer files of the parent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import ACTIVATIONS, both_ropes
from nemo_upcycle.sources.checks import require_finite
from nemo_upcycle.sources.safetensors_folder import INDEX
from nemo_upcycle.utils.files import clear_unfinished, read_json, require_disk, write_json
from nemo_upcycle.utils.progress import ProgressLine
from nemo_upcycle.utils.streams import StreamedFile


MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
#: The coefficient of the load-balancing loss where no checkpoint says another: that of the recipes and of NeMo's
#: Mixtral. transformers' own default is a tenth of it.
ROUTER_AUX_LOSS = 0.01
#: What travels with the weights unchanged: a tokenizer saved again by a newer library may not open in an older one.
_COMPANIONS = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
#: Keys that make a loader import code that somebody else wrote.
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")
_UNFINISHED = ".unfinished"


def moe_config(
    dense_config: dict[str, Any], arch: Architecture, router_aux_loss: float = ROUTER_AUX_LOSS
) -> dict[str, Any]:
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
        "router_aux_loss_coef": router_aux_loss,
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
        raise UpcycleError(
            "type of the weights on disk",
            got=str(dtype).removeprefix("torch."),
            expected=" or ".join(names),
            fix=f"add --dtype {names[0]}",
        )


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
    """Stream tensors into safetensors shards, one tensor in memory at a time. Files that are there whole are kept.

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
    total_bytes = _size_bytes(shapes, shapes, dtype)
    clear_unfinished(folder, f"*{_UNFINISHED}")
    files = shard_files(shapes, dtype, max_shard_bytes)
    headers = {file: safetensors_header(names, shapes, dtype) for file, names in files.items()}
    sizes = {file: _size_bytes(names, shapes, dtype) for file, names in files.items()}
    kept = {file for file in files if is_whole(folder / file, headers[file], sizes[file])}
    require_disk(folder, total_bytes - sum(sizes[file] for file in kept), "the exported weights")
    with ProgressLine(label, len(shapes)) as line:
        for file, names in files.items():
            if file in kept:
                line.advance(len(names))
                continue
            unfinished = folder / f"{file}{_UNFINISHED}"
            with StreamedFile(unfinished) as out:
                out.write(headers[file])
                for name in names:
                    tensor = _checked(name, read(name), shapes[name], dtype)
                    out.write(tensor.view(torch.uint8).numpy().data)
                    line.advance()
            unfinished.rename(folder / file)
    write_index(folder, files, total_bytes)
    return total_bytes


def is_whole(path: Path, header: bytes, data_bytes: int) -> bool:
    """Return whether a safetensors file has this header and so many bytes of data."""
    if not path.is_file() or path.stat().st_size != len(header) + data_bytes:
        return False
    with path.open("rb") as handle:
        return handle.read(len(header)) == header


def _size_bytes(names: Iterable[str], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shapes[name]).numel() for name in names) * dtype.itemsize


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as it lies on disk."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"shape of {name}", got=list(tensor.shape), expected=list(shape), fix="check the checkpoint's config"
        )
    made = tensor.to(dtype).contiguous()
    require_finite(tensor, name, made=made)
    return made


def tokenizer_file_names(dense_folder: Path) -> list[str]:
    """Return the parent's tokenizer, chat templates, generation settings and licences; code is none of them.

    Raises:
        UpcycleError: one is a link to somewhere else: it would publish a file that nobody meant.
    """
    found = {path for pattern in _COMPANIONS for path in dense_folder.glob(pattern) if path.is_file()}
    found = {path for path in found if path.suffix != ".py"}
    folder = dense_folder.resolve()
    # The hub's cache keeps a snapshot as links into the blobs of the same model.
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for path in sorted(found):
        if not any((target := path.resolve()).is_relative_to(home) for home in homes):
            raise UpcycleError(
                str(path),
                got=f"a link to {target}",
                expected=f"a file in {dense_folder}",
                fix="put the file itself into the folder, or remove the link",
            )
    return sorted(str(path.relative_to(dense_folder)) for path in found)


def copy_tokenizer_files(dense_folder: Path, folder: Path) -> list[str]:
    """Copy what `tokenizer_file_names` finds, unchanged but for keys that run code; return the names."""
    names = tokenizer_file_names(dense_folder)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith("_config.json") and _has_code(settings := read_json(dense_folder / name)):
            write_json(folder / name, _without_code(settings))
        else:
            shutil.copyfile(dense_folder / name, folder / name)
    return names


def _has_code(settings: Any) -> bool:
    return isinstance(settings, dict) and any(key in settings for key in _CODE_KEYS)


def _without_code(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _CODE_KEYS}


def write_config(
    dense_folder: Path,
    folder: Path,
    arch: Architecture,
    dtype: torch.dtype,
    router_aux_loss: float | None = None,
) -> None:
    """Write the `config.json` of `arch`, made from the parent's; no key of it makes a loader run code."""
    config = _without_code(read_json(dense_folder / "config.json"))
    if arch.num_experts:
        config = moe_config(config, arch, ROUTER_AUX_LOSS if router_aux_loss is None else router_aux_loss)
    else:
        config |= both_ropes(arch.rope_theta, arch.rope_scaling)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config.pop("dtype", None)
    write_json(folder / "config.json", config)
