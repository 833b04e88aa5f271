"""Memory of a rank: known sums, formulas by hand, and the effect of each change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.published import published_peaks
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.memory import GIB, Memory, in_flight, layer_bytes, stage_memory, worst_memory
from nemo_upcycle.planning.parameters import StageBuffers
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.recipes import known_recipe
from nemo_upcycle.spec import UpcycleSpec
from tests.unit.models.test_nemotron_h import CONFIG


LLAMA = known_recipe("llama3_8b_e8t2").arch
DENSE = known_recipe("llama3_8b_dense_ct").arch
NEMOTRON_H = architecture_from_config(CONFIG)
WORK = Workload(seq_length=8192, global_batch=512, capacity_factor=1.0, pad=True)


@pytest.mark.parametrize(
    ("text", "gpus", "gib"), [("tp=4,ep=8", 8, 101.2), ("ep=8", 16, 78.1), ("pp=4,ep=8", 32, 29.6)]
)
def test_model_states_by_hand(text: str, gpus: int, gib: float) -> None:
    """Each parameter of the worst stage needs 6 + 12 / shards bytes."""
    layout = parse_layout(text, gpus)
    stages = (StageBuffers(LLAMA, layout, WORK, stage) for stage in range(layout.pp))
    worst = max(plan.weights_bytes + plan.gradients_bytes + plan.optimizer_bytes() for plan in stages)
    assert worst / GIB == pytest.approx(gib, abs=0.06)


def test_muon_keeps_one_moment_of_matrices() -> None:
    """Without sharding, numbers in a layer's matrices need 8 bytes each, and all other numbers need 12 bytes each.

    `tests/bridge` measures Megatron.
    """
    others = 2 * LLAMA.vocab_size * LLAMA.hidden_size + (2 * LLAMA.num_layers + 1) * LLAMA.hidden_size
    whole = StageBuffers(LLAMA, parse_layout("ep=8", 8), replace(WORK, optimizer="muon"), 0)
    assert whole.optimizer_bytes() == 8 * whole.params + 4 * others
    assert whole.weights_bytes == 2 * whole.params


def test_activations_of_a_mamba_mixer_by_hand() -> None:
    work, layout = replace(WORK, seq_length=1, global_batch=1), parse_layout("tp=1", 1)
    held = layer_bytes(NEMOTRON_H, layout, work, moe=False, fp8=False, parts="M")
    inner, states = 128 * 64, 8 * 128
    assert held.plain == 2 * (2 * 4096 + 2 * inner + 2 * states + 128 + 3 * inner)


@pytest.mark.parametrize(
    ("arch", "text", "gpus"),
    [(LLAMA, "tp=2,pp=4,vp=8,ep=8", 64), (NEMOTRON_H.upcycled(UpcycleSpec()), "tp=2,pp=5,ep=4", 40)],
    ids=["Llama", "Nemotron-H"],
)
def test_the_ranks_together_hold_every_parameter_once(arch: Architecture, text: str, gpus: int) -> None:
    layout, held = parse_layout(text, gpus), 0
    for stage in range(layout.pp):
        plan = StageBuffers(arch, layout, WORK, stage)
        held += layout.ep * plan.expert_params
        for param in (param for chunk in plan.chunks for param in chunk if not param.mapping.is_expert):
            role = param.mapping.role
            is_cut = len(param.shape) > 1 or (role.startswith("mamba_") and role != "mamba_norm")
            is_cut &= role != "router"
            held += param.numel * (layout.tp if is_cut else 1)
    assert held == arch.total_params + 2 * (layout.padded_vocab(arch) - arch.vocab_size) * arch.hidden_size


def test_what_is_dropped_or_uneven_changes_the_routed_buffers_only() -> None:
    layout = parse_layout("pp=4,vp=8,ep=8", 128)

    def memory(**changes: object) -> dict[str, float]:
        return stage_memory(LLAMA, layout, replace(WORK, **changes), 0).gib()

    even, dropless = memory(), memory(capacity_factor=None, pad=False, imbalance=1.5)
    assert dropless["routed"] == pytest.approx(1.5 * even["routed"], rel=1e-3)
    # A token goes to each of eight experts at most once, so an imbalance needs at most 8 / 2 times the slots of top-2.
    for factor, imbalance, times in ((2.0, 3.0, 2), (None, 9.0, 4)):
        found = memory(capacity_factor=factor, pad=False, imbalance=imbalance)["routed"]
        assert found == pytest.approx(times * even["routed"], rel=1e-3)
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert dropless[name] == even[name]


def test_published_peaks_are_predicted() -> None:
    """Predictions for two BF16 runs are within 5 %. FP8 runs fine-tune and publish less, so 15 % is allowed."""
    peaks = {peak.row.name: peak for peak in published_peaks()}
    llama, qwen = peaks["Llama 3.1 8B"], peaks["Qwen3 30B-A3B, HybridEP"]
    assert llama.predicted() == pytest.approx((llama.allocated_gib, llama.peak_gib), rel=0.05)
    assert qwen.predicted()[1] == pytest.approx(qwen.peak_gib, rel=0.05)
    for peak in peaks.values():
        assert peak.predicted()[1] == pytest.approx(peak.peak_gib, rel=0.15), peak.row.name


def test_low_precision_keeps_copies_scales_and_smaller_inputs() -> None:
    layout = parse_layout("pp=4,vp=8,ep=8", 128)

    def memory(precision: str, stage: int = 1, low_params: bool = False) -> Memory:
        return stage_memory(LLAMA, layout, replace(WORK, precision=precision, low_params=low_params), stage)

    linear = 8 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336)  # eight layers with one expert each
    assert (memory("bf16").fp8_copies, memory("fp8-blockwise").fp8_copies) == (0, 2 * linear)
    assert memory("mxfp8").fp8_copies == linear * 2 * 33 / 32
    assert memory("nvfp4").fp8_copies == linear * 2 * 9 / 16
    # Current scaling keeps the first and the last layer in BF16.
    assert memory("fp8-current", stage=0).fp8_copies == 2 * linear // 8 * 7
    assert memory("fp8-blockwise").weights == memory("bf16").weights
    assert memory("mxfp8").weights - memory("mxfp8", low_params=True).weights == 2 * linear
    assert memory("nvfp4").activations < memory("mxfp8").activations < memory("bf16").activations


def test_micro_batches_in_flight() -> None:
    assert [in_flight(parse_layout("pp=4", 4), WORK, stage) for stage in (0, 3)] == [[4], [1]]
    # Korthikanti et al.: the first stage keeps layers x (1 + (pp - 1) / (pp vp)), which are pp vp + pp - 1 chunks.
    for stages, virtual in ((4, 8), (8, 4), (2, 2)):
        held = sum(in_flight(parse_layout(f"pp={stages},vp={virtual}", stages), WORK, 0))
        assert held == stages * virtual + stages - 1
    # A stage never keeps more micro-batches than the batch has.
    assert sum(in_flight(parse_layout("pp=4,vp=8", 128), replace(WORK, global_batch=128), 0)) <= 4 * 8


def test_the_last_stage_has_the_logits() -> None:
    layout = parse_layout("tp=2,pp=4", 8)
    assert stage_memory(LLAMA, layout, WORK, 0).logits == 0
    assert stage_memory(LLAMA, layout, WORK, 3).logits == 8192 * 128256 // 2 * 10
    _, worst = worst_memory(LLAMA, layout, WORK)
    assert worst.total == max(stage_memory(LLAMA, layout, WORK, number).total for number in range(4))
