"""Random checkpoints of further families, besides those in `tests.models`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.mapping import mapping_of_hf
from nemo_upcycle.models.wrapper import WRAPPERS
from tests.models import save_random, text_sizes, write_class, write_qwen2


#: YaRN from 16 trained positions to 64 (factor 4), so that texts of 32 tokens are longer than the training length.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


#: OLMo 3: attention sees a window, except in every fourth layer.
write_olmo3 = partial(write_class, "Olmo3", window=5, head_dim=None, pad_token_id=0)
#: Multipliers of a Granite. Each differs from the default of the Granite class.
GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.15, "residual_multiplier": 0.22}
GRANITE |= {"logits_scaling": 6.0}


write_granite = partial(write_class, "Granite", layers=2, head_dim=None, pad_token_id=0, **GRANITE)


def write_granite_swa(folder: Path, **changes: Any) -> Path:
    """Write a random GraniteSWA, which has attention sinks.

    In transformers 5, layer 0 sees the whole text and has no positions, and the other layers have a window.
    """
    settings = GRANITE | {"head_dim": None, "pad_token_id": 0} | changes
    if hasattr(transformers, "GraniteSWAConfig"):
        return write_class("GraniteSWA", folder, **{"window": 5, "layer_rope_theta": [0.0, 1e5, 1e5, 1e5]} | settings)
    from tests.granite_swa import GraniteSWAConfig, GraniteSWAForCausalLM

    sizes = text_sizes(layers=2, **settings)
    config = GraniteSWAConfig(**sizes, layer_types=["full_attention"] * 2)
    return save_random(GraniteSWAForCausalLM(config), folder)


#: Gemma: multiplies its embedding, and its norms are centred on one.
write_gemma = partial(write_class, "Gemma", tied=True, layers=2)
#: Gemma 3: every sixth layer sees the whole text. The others see a window and have another rotary base.
write_gemma3 = partial(write_class, "Gemma3", window=5, tied=True, layers=6, query_pre_attn_scalar=24)
#: Gemma 4: layers without a window have their own head sizes. The per-layer embeddings of E2B are omitted.
GEMMA4 = {"window": 5, "rope_theta": None, "global_head_dim": 32, "num_global_key_value_heads": 1, "pad_token_id": 0}
GEMMA4 |= {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0}
write_gemma4 = partial(write_class, "Gemma4", **{"tied": True, "layers": 6} | GEMMA4)
_GROWING = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
_GROWING |= {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "max_position_embeddings": 256}
#: Ministral 3: attention scores grow from position 64 on. Only transformers 5 has the class.
MINISTRAL3: dict[str, Any] = {"rope_parameters": _GROWING, "rope_theta": None, "max_position_embeddings": 256}
write_ministral3 = partial(write_class, "Ministral3", layers=2, pad_token_id=0, **MINISTRAL3)


#: Seed-OSS: only query, key and value have biases.
write_seed_oss = partial(write_class, "SeedOss", pad_token_id=0)
#: HyperCLOVA X: Granite's multipliers, but logits are multiplied, not divided. Only transformers 5 has the class.
CLOVA = GRANITE | {"logits_scaling": 0.15}
write_hyperclovax = partial(write_class, "HyperCLOVAX", layers=2, head_dim=None, pad_token_id=0, **CLOVA)
#: Arcee: networks without a gate.
write_arcee = partial(write_class, "Arcee", layers=2, bos_token_id=1, eos_token_id=2)
#: CWM: the first layer and every fourth layer after it see the whole text. The others see a window. Only transformers
#: 5 has the class.
write_cwm = partial(write_class, "Cwm", window=5, pad_token_id=0)


#: Qwen 3.5: every fourth layer has gated attention, the others gated delta nets. Only transformers 5 has the class.
_NETS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 32, "rope_theta": None}
_NETS |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
#: `mrope_section` divides the rotary dimensions among the axes of a picture. A text has the same position on all axes.
_NETS_ROPE = {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
QWEN35: dict[str, Any] = _NETS | {"rope_parameters": _NETS_ROPE, "pad_token_id": 0}
write_qwen35 = partial(write_class, "Qwen3_5", **QWEN35)


def write_as(kind: str, folder: Path, *, layers: int = 2, **changes: Any) -> Path:
    """Write a random Llama under the class and tensor names of a family that computes like Llama.

    If transformers has the family's configuration class, transformers writes the model itself.
    """
    if hasattr(transformers, f"{kind}Config"):
        return write_class(kind, folder, layers=layers, pad_token_id=0, **changes)
    write_class("Llama", folder, layers=layers, **changes)
    config, arch = json.loads((folder / "config.json").read_text()), read_architecture(folder)
    family = find_family(f"{kind}ForCausalLM")
    assert family
    own = {theirs: mine for mine, theirs in family.spelling.items()}
    config |= {"architectures": [family.hf_class], "model_type": family.model_type}
    (folder / "config.json").write_text(json.dumps({own.get(name, name): value for name, value in config.items()}))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        mapping, part, layer, _ = mapping_of_hf(name, arch)
        tensors[family.names[mapping.role][part].format(layer=layer)] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


write_internlm3, write_iquest_coder, write_exaone3 = (
    partial(write_as, kind) for kind in ("InternLM3", "IQuestCoder", "Exaone")
)


def write_mimo(folder: Path, *, predicts: bool = True, **changes: Any) -> Path:
    """Write a random MiMo: a Qwen2, followed by a layer of multi-token prediction if `predicts` is set."""
    write_qwen2(folder, **changes)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": int(predicts)}))
    if predicts:
        layer = {"final_layernorm.weight": (64,), "input_proj.weight": (64, 128), "self_attn.q_proj.bias": (64,)}
        tensors = {f"model.mtp_layers.0.{name}": torch.ones(shape) for name, shape in layer.items()}
        tensors |= load_file(folder / "model.safetensors")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_granite4(folder: Path, *, tied: bool = True, layers: int = 2, **changes: Any) -> Path:
    """Write a random Granite 4 without experts or Mamba layers."""
    changes = {"intermediate_size": 96} | GRANITE | changes
    changes |= {"shared_intermediate_size": changes.pop("intermediate_size"), "intermediate_size": 32}
    changes |= {"head_dim": None, "pad_token_id": 0, "num_local_experts": 0, "mamba_n_heads": 1}
    changes |= {
        "num_experts_per_tok": 0
    }  # as in granite-4.0-micro: with any other value, llama.cpp assumes that the model has experts
    changes |= {"position_embedding_type": "rope", "layer_types": ["attention"] * layers}
    write_class("GraniteMoeHybrid", folder, tied=tied, layers=layers, **changes)
    config = json.loads((folder / "config.json").read_text())
    config.pop("time_step_limit", None)  # transformers 5 writes a value that it cannot read back
    (folder / "config.json").write_text(json.dumps(config))
    return folder


#: Class of an MoE model -> settings besides those that `write_moe` gives every class.
_OF_MOE: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 48, "norm_topk_prob": True},
    "Qwen2Moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "head_dim": None},
    "Glm4Moe": {
        "moe_intermediate_size": 48,
        "routed_scaling_factor": 2.5,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "FlexOlmo": {"head_dim": None, "pad_token_id": 0},
}


def write_moe(folder: Path, kind: str, *, layers: int = 2, **changes: Any) -> Path:
    """Write a random MoE parent that has 4 experts and sends each token to 2 of them."""
    count = {"Mixtral": "num_local_experts", "Glm4Moe": "n_routed_experts"}.get(kind, "num_experts")
    sizes = {count: 4, "num_experts_per_tok": 2} | _OF_MOE.get(kind, {})
    return write_class(kind, folder, layers=layers, **sizes | changes)


write_mixtral, write_qwen3_moe, write_olmoe = (
    partial(write_moe, kind=kind) for kind in ("Mixtral", "Qwen3Moe", "Olmoe")
)


_SEES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_SEES |= {"image_size": 28, "patch_size": 14}
_OF_QWEN = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
_OF_QWEN |= {"patch_size": 14, "fullatt_block_indexes": [1]}
_DOCLING = {"image_size": 56, "out_hidden_size": 64, "scale_factor": 2, "deepstack_visual_indexes": [0]}
_AXES = {"rope_type": "default", "mrope_section": [2, 3, 3]}
#: Multimodal class -> class of its text model, vision settings, text settings, settings of the whole model.
WRAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Mistral3": ("Mistral", _SEES | {"head_dim": 16, "image_size": 56}, {"window": None}, {"image_token_index": 249}),
    "Llava": ("Llama", _SEES | {"projection_dim": 32}, {}, {"image_seq_length": 4, "image_token_index": 249}),
    "InternVL": (
        "Qwen2",
        _SEES | {"image_size": [28, 28], "patch_size": [14, 14]},
        {"head_dim": None},
        {"image_token_id": 249},
    ),
    "Gemma3": (
        *("Gemma3Text", _SEES, {"window": 5, "rope_theta": None, "query_pre_attn_scalar": 24}),
        {"mm_tokens_per_image": 1},
    ),
    "Gemma4": (
        "Gemma4Text",
        {name: size for name, size in _SEES.items() if name != "image_size"}
        | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
        *(GEMMA4 | {"rms_norm_eps": 1e-12}, {"image_token_id": 249}),
    ),
    "Gemma4Unified": (
        *("Gemma4UnifiedText", {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 16}),
        *({name: size for name, size in GEMMA4.items() if "per_layer" not in name} | {"rms_norm_eps": 1e-12}, {}),
    ),
    "Qwen2_5_VL": ("Qwen2_5_VLText", _OF_QWEN, {"head_dim": None, "rope_scaling": _AXES}, {}),
    "Qwen3VL": (
        "Qwen3VLText",
        _OF_QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {"rope_scaling": _AXES | {"mrope_interleaved": True}},
        {"image_token_id": 249, "vision_start_token_id": 248},
    ),
    "Qwen3_5": (
        *("Qwen3_5Text", _OF_QWEN | {"num_position_embeddings": 16}),
        *(QWEN35 | {"full_attention_interval": 2}, {"image_token_id": 249}),
    ),
    **{
        kind: (
            *("Qwen3_5Text", _SEES | {"insert_layer_id": 0}),
            *(QWEN35 | {"full_attention_interval": 2}, {"image_token_id": 249, "insert_layer_id": 0}),
        )
        for kind in ("MiniCPMV4_7", "MiniCPMOcr")
    },
    "GraniteDocling": (
        *("GraniteDoclingText", _SEES | _DOCLING),
        *(GRANITE | {"head_dim": None, "pad_token_id": 0}, {"image_token_id": 249, "density_router_hidden_size": 16}),
    ),
    "HyperCLOVAXVisionV2": (
        *("HyperCLOVAX", _OF_QWEN),
        *({"head_dim": None, "pad_token_id": 0, **CLOVA, "use_post_norm": False}, {"image_token_id": 249}),
    ),
    "Exaone4_5_": ("Exaone4", _OF_QWEN | {"num_key_value_heads": 2}, {"window": 5, "pad_token_id": 0}, {}),
    "Idefics3": ("Llama", _SEES, {"pad_token_id": 0}, {"scale_factor": 2, "image_token_id": 249}),
    "SmolVLM": ("Llama", _SEES, {"pad_token_id": 0}, {"scale_factor": 2, "image_token_id": 249}),
}


def write_wrapped(
    folder: Path, kind: str, *, text: str = "", tied: bool = False, layers: int = 2, **changes: Any
) -> Path:
    """Write a random multimodal model: a text model with a vision tower and a projector, as transformers saves it.

    Args:
        folder: folder to write.
        kind: a key of `WRAPPED`.
        text: class of the text model, "" for the class in `WRAPPED`.
        tied: see `write_class`.
        layers: number of text layers.
        changes: settings of the text model.
    """
    import transformers

    torch.manual_seed(7)
    own, sees, settings, whole = WRAPPED[kind]
    text_type = getattr(transformers, f"{text or own}Config").model_type
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": text_type, **text_sizes(tied=tied, layers=layers, **settings | changes)},
        vision_config=dict(sees),
        tie_word_embeddings=tied,
        **whole,
    )
    return save_random(getattr(transformers, f"{kind}ForConditionalGeneration")(config), folder)


def put_around(folder: Path, kind: str) -> Path:
    """Put a class around a text model in place, with one tensor outside the text model.

    transformers saves the text model under these names, too (`tests/loading/test_wrapped.py`), but only newer releases
    have the class.
    """
    config = json.loads((folder / "config.json").read_text())
    wrapper = next(one for one in WRAPPERS if one.hf_class == f"{kind}ForConditionalGeneration")
    whole = {"architectures": [wrapper.hf_class], "model_type": wrapper.model_type, "text_config": config}
    whole |= {"tie_word_embeddings": config["tie_word_embeddings"], "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    inner = "model.text_model." if kind == "GraniteDocling" else "model.language_model."
    tensors = {f"model.{wrapper.parts[0]}.weight": torch.ones(2, 2)}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_inside = name.startswith("model.")
        tensors[inner + name.removeprefix("model.") if is_inside else wrapper.head + name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
