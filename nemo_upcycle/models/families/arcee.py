"""Arcee (AFM-4.5B): a Llama with ungated networks and squared ReLU."""

from __future__ import annotations

from nemo_upcycle.models.families import llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS, Family


FAMILY = Family(
    title="Arcee",
    hf_class="ArceeForCausalLM",
    model_type="arcee",
    names=llama.NAMES | {name: (llama.NAMES[name][1],) * 2 for name in ("fc1", "fc1_bias")},
    defaults=COMMON_DEFAULTS | {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    gated=False,
)
