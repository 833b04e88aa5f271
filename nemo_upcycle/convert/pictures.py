"""Make a random picture for a vision-language model, from the numbers in its `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


_SEED = 3
#: Keys of `config.json` for the token that stands for a piece of a picture.
_TOKEN_KEYS = ("image_token_id", "image_token_index")


def with_picture(tokens_S: torch.Tensor, config: Any) -> dict[str, torch.Tensor] | None:
    """Put a random picture into a text, and return the arguments of the model's `forward`.

    Args:
        tokens_S: token ids of the text.
        config: configuration of the whole model, as transformers loads it.

    Returns:
        Names of arguments -> tensors, for a batch of one. None if the kind of model is unknown.

    Example:
        >>> from transformers import LlavaConfig
        >>> inputs = with_picture(torch.arange(4), LlavaConfig())
        >>> inputs["pixel_values"].shape, inputs["input_ids"].shape
        (torch.Size([1, 3, 336, 336]), torch.Size([1, 580]))
    """
    from transformers import __version__

    make = _PICTURES.get(config.model_type)
    token = next((value for key in _TOKEN_KEYS if isinstance(value := getattr(config, key, None), int)), None)
    if make is None or token is None:
        return None
    picture, count = make(config, torch.Generator().manual_seed(_SEED))
    ids_BS = torch.cat([tokens_S[:1], torch.full((count,), token), tokens_S[1:]])[None]
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), **picture}
    if config.model_type.startswith("qwen3") and not __version__.startswith("4."):
        inputs["mm_token_type_ids"] = (ids_BS == token).int()  # transformers 5 derives positions from these types
    return inputs


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator)


def _side(vision: Any, patch: int) -> int:
    """Return the height of a square picture, a multiple of the patch size (pixels)."""
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return int(size) // patch * patch


def _patch(vision: Any) -> int:
    return int(vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0])


def _llava(config: Any, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    patch = _patch(config.vision_config)
    side = _side(config.vision_config, patch)
    count = (side // patch) ** 2 + (config.vision_feature_select_strategy == "full")
    return {"pixel_values": _random((1, 3, side, side), generator)}, count


def _mistral3(config: Any, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    side = _patch(config.vision_config) * config.spatial_merge_size
    picture = _random((1, 3, side, 2 * side), generator)
    return {"pixel_values": picture, "image_sizes": torch.tensor([[side, 2 * side]])}, 2


def _internvl(config: Any, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    patch = _patch(config.vision_config)
    side = _side(config.vision_config, patch)
    count = round((side // patch * config.downsample_ratio) ** 2)
    return {"pixel_values": _random((1, 3, side, side), generator)}, count


def _idefics3(config: Any, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    patch = _patch(config.vision_config)
    side = _side(config.vision_config, patch)
    count = (side // patch // config.scale_factor) ** 2
    return {"pixel_values": _random((1, 1, 3, side, side), generator)}, count


def _qwen3(config: Any, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    picture = _random((2 * merge * merge, width), generator)
    return {"pixel_values": picture, "image_grid_thw": torch.tensor([[1, merge, 2 * merge]])}, 2


def _gemma4(config: Any, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    vision = config.vision_config
    side = 2 * vision.pooling_kernel_size
    places = torch.tensor([[[column, row] for row in range(side) for column in range(side)]])
    picture = _random((1, side * side, 3 * vision.patch_size**2), generator)
    return {"pixel_values": picture, "image_position_ids": places}, 4


def _minicpm_ocr(config: Any, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    patch = _patch(config.vision_config)
    side = config.merge_kernel_size[0] * (1 if config.downsample_mode == "4x" else 2)  # in patches
    picture = _random((1, 3, patch, patch * side * 2 * side), generator)
    return {"pixel_values": picture, "target_sizes": torch.tensor([[side, 2 * side]])}, 2


_Maker = Callable[[Any, torch.Generator], tuple[dict[str, torch.Tensor], int]]
#: `model_type` -> function that makes a picture.
_PICTURES: Mapping[str, _Maker] = {
    "llava": _llava,
    "mistral3": _mistral3,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "qwen3_5": _qwen3,
    "qwen3_5_moe": _qwen3,
    "gemma4": _gemma4,
    "hyperclovax_vision_v2": _qwen3,
    "minicpm_ocr": _minicpm_ocr,
}
