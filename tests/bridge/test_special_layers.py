"""Parents with other layers than Llama compute the same in Bridge's GPTModel as in transformers, even if upcycled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from tests.distributed.ranks import run_ranks
from tests.loading.cases import PARENTS
from tests.models import hugging_face_logits, sample_tokens
from tests.parents import write_granite_swa, write_qwen35
from tests.tiers import quick


# OLMo 3 with YaRN is excluded: transformers 5.12 applies YaRN to all layers, 4.57 only to layers with full attention
# (tests/unit/models/test_parents.py). Ministral 3 covers YaRN.
LLAMAS = ("Llama", "Qwen2", "Qwen3", "InternLM3", "IQuest-Coder")
WRITERS = {name: write for name, write in PARENTS.items() if name not in (*LLAMAS, "Gemma 4")}
WRITERS |= {"Qwen3.5": write_qwen35, "GraniteSWA": write_granite_swa}
SPEC = UpcycleSpec(num_experts=4, top_k=2)


def _logits(folder: Path, spec: UpcycleSpec | None, tensor: int) -> torch.Tensor:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge.models.conversion.utils import unwrap_model

    from nemo_upcycle.trainers.bridge.models import upcycled_provider
    from nemo_upcycle.trainers.equivalence import megatron_logits

    settings = {"params_dtype": torch.float32, "bf16": False, "seq_length": 64, "sequence_parallel": tensor > 1}
    provider = upcycled_provider(folder, spec, tensor_model_parallel_size=tensor, **settings)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    chunks = unwrap_model(provider.provide_distributed_model(wrap_with_ddp=False))
    with open_dense(folder) as dense:
        assert upcycle_into(chunks, dense, spec).exact
    with torch.no_grad():
        return megatron_logits(chunks[0].eval(), sample_tokens(250))


@pytest.mark.parametrize("spec", [None, SPEC], ids=["dense", "upcycled"])
@pytest.mark.parametrize(("name", "tensor"), quick([(one, n) for one in WRITERS for n in (1, 2)], ("OLMo 2", 2)))
def test_bridges_model_computes_what_the_parent_does(
    tmp_path: Path, name: str, tensor: int, spec: UpcycleSpec | None
) -> None:
    folder = WRITERS[name](tmp_path / "dense")
    parts = run_ranks(_logits, tensor, folder, spec, tensor)
    wanted, got = hugging_face_logits(folder, sample_tokens(250)), torch.cat(parts, dim=-1)[..., :250]
    # Gated delta nets add up their chunks in another order.
    assert float((got - wanted).norm() / wanted.norm()) <= (4e-6 if name == "Qwen3.5" else 2e-6)
