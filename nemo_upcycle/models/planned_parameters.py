"""The parameters that only models have which are planned only: latent attention's, sinks, those around experts."""

from __future__ import annotations

from nemo_upcycle.models.architecture import Architecture


_ATTENTION, _MOE = "self_attention.", "mlp."
#: Role -> Megatron's name inside a layer, and how tensor parallelism cuts it, by the values of `mapping.Sharding`.
PLANNED = {
    "query": (_ATTENTION + "linear_q_proj.weight", "parts"),
    "query_down": (_ATTENTION + "linear_q_down_proj.weight", "replicated"),
    "query_up_norm": (_ATTENTION + "linear_q_up_proj.layer_norm_weight", "replicated"),
    "query_up": (_ATTENTION + "linear_q_up_proj.weight", "parts"),
    "kv_down": (_ATTENTION + "linear_kv_down_proj.weight", "replicated"),
    "kv_up_norm": (_ATTENTION + "linear_kv_up_proj.layer_norm_weight", "replicated"),
    "kv_up": (_ATTENTION + "linear_kv_up_proj.weight", "parts"),
    "sinks": (_ATTENTION + "core_attention.softmax_offset", "parts"),
    "narrowed": (_MOE + "fc1_latent_proj.weight", "replicated"),
    "widened": (_MOE + "fc2_latent_proj.weight", "replicated"),
}


def planned_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return role and shape of those that a model has."""
    shapes: dict[str, tuple[int, ...]] = {"sinks": (arch.num_heads,)} if arch.attention_sinks else {}
    if narrow := arch.expert_input_size:
        shapes |= {"narrowed": (narrow, arch.hidden_size), "widened": (arch.hidden_size, narrow)}
    if latent := arch.latent:
        matrices = latent.projections(arch.hidden_size, arch.num_heads)
        shapes |= {role: (matrix.outputs, matrix.inputs) for role, matrix in matrices.items()}
        shapes |= {"query_up_norm": (latent.query_rank,)} if latent.query_rank else {}
        shapes["kv_up_norm"] = (latent.kv_rank,)
    return shapes
