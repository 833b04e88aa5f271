"""Checkpoints with a text model and further parts, as in vision-language models.

The family describes the text model itself. This file describes the names and settings that the class around it adds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.utils.files import read_json


#: Prefix of the text model's tensor names in the files -> prefix in a folder with only a text model. The first match
#: counts. transformers 5 has the first prefix in memory. transformers 4 wrote the next two prefixes, and transformers
#: 5 still writes them for some classes.
PREFIXES = {
    "model.language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.text_model.": "model.",
}
#: Name of the index that lists the file of each tensor, and name of the weight file if there is only one file.
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_OUTPUT = "lm_head.weight"
#: `model_type` of a text part -> `model_type` of the text-only class that computes the same on text.
_SAME = {
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "exaone4_5_text": "exaone4",
    "granite_docling_text": "granite",
    "gemma4_unified_text": "gemma4_text",
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
#: `model_type` of a text part -> default sizes, which transformers does not write to the file.
_UNSAID = {
    "llama": (4096, 11008, 32, 32, 32000),
    "mistral": (4096, 14336, 32, 32, 32000),
    "ministral3": (4096, 14336, 34, 32, 131072),
    "qwen2": (4096, 22016, 32, 32, 151936),
    "qwen3": (4096, 22016, 32, 32, 151936),
    "qwen2_5_vl_text": (8192, 29568, 80, 64, 152064),
    "qwen3_vl_text": (4096, 22016, 32, 32, 151936),
    "gemma3_text": (2304, 9216, 26, 8, 262208),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), (2304, 9216, 30, 8, 262144)),
    "exaone4": (4096, 16384, 32, 32, 102400),
    "granite_docling_text": (1024, 2048, 28, 16, 133800),
    "qwen3_5_text": (4096, 12288, 32, 16, 248320),
}
#: `model_type` of a text part -> defaults of other settings that differ from the defaults of the class that computes
#: the text part.
_OTHER: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_text": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "qwen3_vl_text": {"max_position_embeddings": 128000},
    "ministral3": {"rms_norm_eps": 1e-5},
    "granite_docling_text": {
        **{"num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
        **{"embedding_multiplier": 12.0, "attention_multiplier": 0.015625},
        **{"residual_multiplier": 0.263, "logits_scaling": 4.0},
    },
    "gemma4_unified_text": {
        "hidden_size_per_layer_input": 0,
        "sliding_window": 1024,
        "max_position_embeddings": 2**18,
    },
}
_THETA = {"qwen2_5_vl_text": 1e6, "qwen3_vl_text": 5e5}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_ROPES = ("rope_parameters", "rope_scaling")
#: Settings that share a rotary embedding between the axes of a picture. They have no effect on text, because in a text
#: all axes have the same positions.
_OF_PICTURES = ("mrope_section", "mrope_interleaved")
#: `model_type` of text models that are also published without other parts, but with the settings in `_OF_PICTURES`.
_PARTS = ("qwen3_5_text", "qwen3_5_moe_text")
#: Settings of a text part that transformers reads only in the text-only class -> value that changes nothing. Most
#: classes around a text part do not scale the logits of the output layer.
_UNREAD = {"logits_scaling": 1.0}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Wrapper:
    """A Hugging Face class that has a text model among its parts.

    Args:
        hf_class: class in `architectures`.
        model_type: `model_type` in `config.json`.
        text_type: `model_type` of the text model, if the text settings do not contain it.
        parts: prefixes of the tensor names of the other parts.
        takes_experts: whether the class builds its text model by the `model_type` in the text settings, so that an
            MoE text model works, too.
        moe_class: class around an MoE text model, if this class differs from `hf_class`.
        scales_logits: whether the class applies the text model's `logits_scaling`.
        head: prefix of the output layer's name in the files, if the prefix is not the usual prefix.
    """

    hf_class: str
    model_type: str
    text_type: str
    parts: tuple[str, ...]
    takes_experts: bool = False
    moe_class: str = ""
    scales_logits: bool = False
    head: str = ""

    @property
    def around_experts(self) -> Wrapper | None:
        """The class around an MoE text model; None if no class is known."""
        return self if self.takes_experts else next((one for one in WRAPPERS if one.hf_class == self.moe_class), None)

    def part_of(self, name: str) -> str | None:
        """Return which of the other parts a tensor belongs to; None for the text model."""
        part = name.removeprefix("model.").partition(".")[0]
        return part if part in self.parts else None

    @staticmethod
    def text_name(name: str) -> str:
        """Return the name that a tensor of the text model has in a folder with only a text model.

        Example:
            >>> Wrapper.text_name("language_model.model.layers.0.mlp.up_proj.weight")
            'model.layers.0.mlp.up_proj.weight'
        """
        old = next((old for old in PREFIXES if name.startswith(old)), "")
        return PREFIXES.get(old, "") + name.removeprefix(old)


#: Layers for multi-token prediction. They have dense networks, so they do not fit a model with experts.
MTP = "mtp"
_LLAVA, _QWEN, _IDEFICS = ("vision_tower", "multi_modal_projector"), ("visual",), ("vision_model", "connector")
_CLOVA, _CLOVA_PARTS = "HyperCLOVAXVisionV2ForConditionalGeneration", ("vision_model", "vision_projector")
_MINICPM = ("vision_tower", "merger", MTP)
_QWEN35, _QWEN35_MOE = "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"
_QWEN3, _QWEN3_MOE = "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"
_GEMMA4 = ("vision_tower", "embed_vision", "audio_tower", "embed_audio", "vision_embedder")
WRAPPERS = (
    Wrapper("Mistral3ForConditionalGeneration", "mistral3", "mistral", _LLAVA, takes_experts=True),
    Wrapper("LlavaForConditionalGeneration", "llava", "llama", _LLAVA, takes_experts=True),
    Wrapper("InternVLForConditionalGeneration", "internvl", "qwen2", _LLAVA, takes_experts=True),
    Wrapper("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", _LLAVA),
    Wrapper("Gemma4ForConditionalGeneration", "gemma4", "gemma4_text", _GEMMA4, takes_experts=True),
    Wrapper("Gemma4UnifiedForConditionalGeneration", "gemma4_unified", "gemma4_unified_text", _GEMMA4),
    Wrapper("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "qwen2_5_vl_text", _QWEN),
    Wrapper(_QWEN3, "qwen3_vl", "qwen3_vl_text", _QWEN, moe_class=_QWEN3_MOE),
    Wrapper(_QWEN3_MOE, "qwen3_vl_moe", "qwen3_vl_moe_text", _QWEN, moe_class=_QWEN3_MOE),
    Wrapper(_QWEN35, "qwen3_5", "qwen3_5_text", (*_QWEN, MTP), moe_class=_QWEN35_MOE),
    Wrapper(_QWEN35_MOE, "qwen3_5_moe", "qwen3_5_moe_text", (*_QWEN, MTP), moe_class=_QWEN35_MOE),
    Wrapper("MiniCPMV4_7ForConditionalGeneration", "minicpmv4_7", "qwen3_5_text", _MINICPM, takes_experts=True),
    Wrapper("MiniCPMOcrForConditionalGeneration", "minicpm_ocr", "qwen3_5_text", _MINICPM, takes_experts=True),
    Wrapper(
        *(_CLOVA, "hyperclovax_vision_v2", "hyperclovax", _CLOVA_PARTS),
        takes_experts=True,
        scales_logits=True,
        head="model.language_model.",
    ),
    Wrapper("Exaone4_5_ForConditionalGeneration", "exaone4_5", "exaone4", (*_QWEN, MTP)),
    Wrapper(
        *("GraniteDoclingForConditionalGeneration", "granite_docling", "granite_docling_text"),
        ("vision_model", "density_router"),
        scales_logits=True,
    ),
    Wrapper("Idefics3ForConditionalGeneration", "idefics3", "llama", _IDEFICS, takes_experts=True),
    Wrapper("SmolVLMForConditionalGeneration", "smolvlm", "llama", _IDEFICS, takes_experts=True),
)


def wrapper_of(config: Any) -> Wrapper | None:
    """Find the class around the text model in a parsed `config.json`; None if the file describes only a text model."""
    names = config.get("architectures") if isinstance(config, dict) else None
    kind = config.get("model_type") if isinstance(config, dict) and not names else None
    return next((one for one in WRAPPERS if names == [one.hf_class] or one.model_type == kind), None)


def text_settings(config: Any, where: str) -> Any:
    """Return the configuration of the text model, in the form of a text-only model.

    Args:
        config: the parsed `config.json`. The settings of a text-only model do not change, except that rotary settings
            for pictures are removed.
        where: name of the file in messages.

    Raises:
        CheckpointError: the settings of the text model are not a mapping.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        is_part = isinstance(config, dict) and config.get("model_type") in _PARTS
        return config | _ropes(config) if is_part else config
    # The first Qwen-VL models have the text settings at the top level, among all other settings.
    text = config.get("text_config")
    text = {**config, "model_type": None} if text is None else text
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{where}: text_config", got=text, expected="the settings of a text model", fix="correct config.json"
        )
    kind = text.get("model_type") or wrapper.text_type
    text = {key: value for key, value in text.items() if key not in ("architectures", "vision_config")}
    text |= _ropes(text)
    text |= {} if wrapper.scales_logits else {key: value for key, value in _UNREAD.items() if key in text}
    unsaid = dict(zip(_SIZES, _UNSAID.get(kind, ()), strict=False)) | _OTHER.get(kind, {})
    if not any(isinstance(text.get(key), dict) and "rope_theta" in text[key] for key in _ROPES):
        unsaid |= {"rope_theta": _THETA[kind]} if kind in _THETA else {}
        unsaid |= {"rope_parameters": _YARN} if kind == "ministral3" and not text.get("rope_scaling") else {}
    # If the text settings lack the following settings, use the top-level settings, as transformers does.
    unsaid |= {key: config[key] for key in ("quantization_config", *_TOKENS) if config.get(key) is not None}
    text |= {key: value for key, value in unsaid.items() if text.get(key) is None}
    if config.get("tie_word_embeddings") is not None:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text | {"model_type": _SAME.get(kind, kind)}


def around_text(whole: dict[str, Any], text: dict[str, Any], wrapper: Wrapper) -> dict[str, Any]:
    """Return the `config.json` of a vision-language model with a new text model.

    Args:
        whole: `config.json` of the parent.
        text: settings of the new text model, in the form of a text-only model. The function changes this
            mapping in place: it adds settings of the class around the text model.
        wrapper: the class around the text model.
    """
    old, config = str(whole.get("model_type")), whole | {"architectures": [wrapper.hf_class]}
    said = whole.get("text_config", whole)
    axes = {key: rope[key] for rope in map(said.get, _ROPES) if rope for key in _OF_PICTURES if key in rope}
    text |= {key: said[key] for key in _UNREAD if key in said}  # a server may read these settings
    text |= {key: {"rope_type": "default"} | (text.get(key) or {}) | axes for key in _ROPES if axes}
    if text["architectures"] == config["architectures"]:
        del text["architectures"]
    # The model_type of each part begins with the model_type of the whole model.
    for key, part in whole.items():
        if isinstance(part, dict) and (kind := str(part.get("model_type"))).startswith(old):
            config[key] = part | {"model_type": wrapper.model_type + kind.removeprefix(old)}
    tied = text.get("tie_word_embeddings", False)
    return config | {"model_type": wrapper.model_type, "text_config": text, "tie_word_embeddings": tied}


def _ropes(text: dict[str, Any]) -> dict[str, Any]:
    return {key: _of_text(text[key]) for key in _ROPES if isinstance(text.get(key), dict)}


def _of_text(rope: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in rope.items() if key not in _OF_PICTURES}
    return kept | {key: "default" for key in ("type", "rope_type") if kept.get(key) == "mrope"}


def read_config(folder: Path) -> Any:
    """Read the `config.json` of a folder, or only the settings of the text model if there are other parts.

    If a model with other parts has no output layer in its files, the embeddings count as tied, whatever the settings
    say. Releases of transformers read `tie_word_embeddings` at different levels and with different defaults.

    Args:
        folder: Hugging Face folder with `config.json`.

    Raises:
        CheckpointError: the settings of the text model are not a mapping.
    """
    path = folder / "config.json"
    config = read_json(path)
    text = text_settings(config, str(path))
    if text is not config and (names := tensor_names(folder)) is not None:
        has_output = any(Wrapper.text_name(name) == _OUTPUT for name in names)
        text["tie_word_embeddings"] = not has_output or text.get("tie_word_embeddings", False)
    return text


def tensor_names(folder: Path) -> Iterable[str] | None:
    """Return the tensor names from a folder's index or from the header of its only file; None if both are missing."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        return names if isinstance(names, Mapping) else None
    if not (folder / SINGLE).is_file():
        return None
    with (folder / SINGLE).open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        raw = handle.read(size) if size < (folder / SINGLE).stat().st_size else b""
    try:
        return list(json.loads(raw))
    except ValueError:  # the code that opens the weights reports what is wrong
        return None
