"""Parents without a family here are filled by Bridge's mappings, and their networks become experts by our plan."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import UpcycleError
from tests.bridge.runs import SEQUENCE, VOCABULARY, run_config, train_on_ranks
from tests.distributed.ranks import run_ranks
from tests.models import write_class
from tests.parents import write_gemma
from tests.tiers import quick


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SPEC: dict[str, Any] = {"num_experts": 4, "top_k": 2}
PARENTS: dict[str, Any] = {
    "nemotron": partial(write_class, "Nemotron", norm_eps=1e-5),
    "gemma": write_gemma,
}
LAYOUTS: list[dict[str, int]] = [{}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parents")


def written(parents: Path, kind: str) -> Path:
    folder = parents / kind
    return folder if folder.is_dir() else PARENTS[kind](folder, vocab_size=VOCABULARY)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", PARENTS)
def test_all_but_experts_has_the_bits_of_bridges_own_loader_and_step_0_its_loss(
    parents: Path, tmp_path: Path, kind: str, layout: dict[str, int]
) -> None:
    ranks = max(layout.get("tp", 1) * layout.get("pp", 1), layout.get("ep", 1))
    for differing, gap in run_ranks(_compare, ranks, written(parents, kind), tmp_path / "run", layout):
        assert differing == []
        assert gap <= 1e-6


def _compare(parent: Path, folder: Path, layout: dict[str, int]) -> tuple[list[str], float]:
    """Fill a model with experts by the hook, and a dense one by Bridge alone.

    Returns:
        The parameters that differ, of experts from the network, and by how much the loss does; 0 with pipeline stages.
    """
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge import AutoBridge

    from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start

    config = run_config(parent, folder, UpcycleSpec(**SPEC), **layout)
    upcycle_on_start(config, parent, UpcycleSpec(**SPEC))
    config._checkpoint_load_required = False
    config.model.finalize()
    config.model.initialize_model_parallel(seed=1)
    (moe,) = config.model.provide_distributed_model(wrap_with_ddp=False)
    bridge = AutoBridge.from_hf_pretrained(str(parent))
    provider = bridge.to_megatron_provider(load_weights=False)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "params_dtype", "pipeline_dtype", "bf16"):
        setattr(provider, name, getattr(config.model, name))
    provider.finalize()
    (dense,) = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights([dense])
    theirs = dict(dense.named_parameters())
    differing = []
    for name, parameter in moe.named_parameters():
        layer, _, inner = name.partition(".mlp.experts.local_experts.")
        source = f"{layer}.mlp.{inner.partition('.')[2]}" if inner else name
        if "router" not in name and not torch.equal(theirs[source], parameter):
            differing.append(name)
    if "pp" in layout:
        return differing, 0.0
    tokens = torch.arange(SEQUENCE)[None] * 7 % VOCABULARY
    places = torch.arange(SEQUENCE)[None]
    with torch.no_grad():
        losses = [model(tokens, places, None, labels=tokens.roll(-1)) for model in (moe, dense)]
    return differing, float((losses[0] - losses[1]).abs().max() / losses[1].abs().max())
