"""The configuration of a checkpoint whose model is planned only, in Hugging Face's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.models.layer_settings import layer_pattern


#: Megatron's setting -> that of each class here.
_SETTINGS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "rotary_base": "rope_theta",
    "seq_length": "max_position_embeddings",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "mtp_num_layers": "num_nextn_predict_layers",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "moe_latent_size": "moe_latent_size",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
}


def planned_config(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a `config.json` says of a model that is planned only, without its vocabulary; None for others.

    Args:
        settings: of the model, by Megatron's names, as plain values.
    """
    get: Any = settings.get
    pattern = (get("hybrid_layer_pattern") or get("hybrid_override_pattern") or "").partition("/")[0].replace("|", "")
    width, experts = get("moe_ffn_hidden_size") or get("ffn_hidden_size"), get("num_moe_experts")
    shared = get("moe_shared_expert_intermediate_size") or 0
    config = {theirs: get(ours) for ours, theirs in _SETTINGS.items() if get(ours) is not None}
    config |= {"intermediate_size": get("ffn_hidden_size"), "moe_intermediate_size": width}
    config |= {
        "n_routed_experts": experts,
        "num_local_experts": experts,
        "rms_norm_eps": get("layernorm_epsilon", 1e-5),
    }
    if get("multi_latent_attention"):
        dense = layer_pattern(get("moe_layer_freq") or 1, get("num_layers")).count(False)
        names = {"architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": dense}
        return config | names | {"n_shared_experts": shared // width}
    if "M" in pattern:
        names = {"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": pattern}
        sizes = {"moe_shared_expert_intermediate_size": shared or 1, "n_shared_experts": int(shared > 0)}
        return config | names | sizes | {"num_hidden_layers": len(pattern)}
    if get("softmax_type") == "learnable":
        windows = [_has_window(get("window_attn_skip_freq"), layer) for layer in range(get("num_layers"))]
        kinds = ["sliding_attention" if has_window else "full_attention" for has_window in windows]
        names = {"architectures": ["GptOssForCausalLM"], "intermediate_size": width, "layer_types": kinds}
        return config | names | {"sliding_window": get("window_size")[0] + 1}
    return None


def _has_window(every: Any, layer: int) -> bool:
    """Return whether a layer's attention has the window, as Megatron-Core's `window_attn_skip_freq` says."""
    if every is None:
        return True
    return (layer + 1) % every != 0 if isinstance(every, int) else bool(every[layer])
