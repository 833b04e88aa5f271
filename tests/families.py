"""Model families that the package does not have, each its one record: what a new one may say of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nemo_upcycle.models import families
from nemo_upcycle.models.families import Family, llama
from nemo_upcycle.models.families.base import COMMON_DEFAULTS


_QKV, _GATE_UP = llama.LAYER + "self_attn.qkv_proj.weight", llama.LAYER + "mlp.gate_up_proj.weight"
PHI3 = Family(
    title="Phi-3",
    hf_class="Phi3ForCausalLM",
    model_type="phi3",
    names=llama.NAMES | {"qkv": (_QKV, _QKV, _QKV), "fc1": (_GATE_UP, _GATE_UP)},
    defaults=COMMON_DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)


@contextmanager
def registered(*added: Family) -> Iterator[None]:
    """Let the package know families for a while."""
    for family in added:
        families.register(family)
    try:
        yield
    finally:
        for family in added:
            del families._FAMILIES[family.hf_class]
