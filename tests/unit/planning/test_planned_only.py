"""Models that are planned only: counts of their model cards, a rank's parameters, NVIDIA's FLOPs and speeds."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from benchmarks.published import Published, public_config, published_rows, shape
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.flops import flops_per_token, mean_context
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.memory import layer_bytes
from nemo_upcycle.planning.parameters import StagePlan
from nemo_upcycle.planning.rules import check_layout
from nemo_upcycle.planning.search import PlanRequest, search, usual_overlap
from nemo_upcycle.planning.throughput import ThroughputModel
from nemo_upcycle.planning.workload import Workload


WORK = Workload(seq_length=4096, global_batch=4096)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # arXiv 2508.10925, table 1: active parameters are counted without the embedding.
        ("gpt_oss_120b", 116.83e9, 5.13e9),
        ("gpt_oss_20b", 20.91e9, 3.61e9),
        # README_WEIGHTS.md of DeepSeek-V3; one of its two tables is left out of the 36.7B, whatever the text says.
        ("deepseek_v3", 671e9, 36.7e9),
        ("grok_1", 314e9, None),  # README.md of xai-org/grok-1
        ("nemotron_3_nano", 31.6e9, 3.2e9),  # its technical report: 3.6B with the embedding
        ("nemotron_3_super", 120e9, None),  # its model card; "12B active" is rounded by more
        ("nemotron_h_8b", 8.1e9, None),  # its model card
    ],
)
def test_parameters_are_those_of_the_model_card(name: str, total: float, active: float | None) -> None:
    arch = shape(name)
    assert arch.total_params == pytest.approx(total, rel=0.01)
    if active:
        assert arch.active_params - arch.embedding_params == pytest.approx(active, rel=0.01)


def test_multi_token_prediction_is_counted_apart() -> None:
    arch = shape("deepseek_v3")
    assert arch.mtp_params() == pytest.approx(11.5e9, rel=0.01)  # README_WEIGHTS.md: "11.5B unique parameters"
    assert shape("deepseek_v3_without_mtp").total_params == arch.total_params
    assert arch.mtp_params(active=True) < 0.1 * arch.mtp_params()


@pytest.mark.parametrize(
    ("name", "text", "gpus"),
    [
        ("deepseek_v3", "pp=4,vp=4,ep=64,loss=3", 256),
        ("deepseek_v3", "tp=2,pp=8,vp=4,ep=64,embedding=1,loss=2", 1024),
        ("gpt_oss_120b", "pp=4,ep=8", 64),
        ("nemotron_3_nano", "pp=4,ep=8", 64),
        ("nemotron_3_super", "tp=2,ep=64", 64),
        ("grok_1", "pp=8,vp=8,ep=8", 64),
    ],
)
def test_the_ranks_together_hold_every_parameter_once(name: str, text: str, gpus: int) -> None:
    arch, layout = shape(name), parse_layout(text, gpus)
    check_layout(layout, arch, WORK)
    held = 0
    for stage in range(layout.pp):
        plan = StagePlan(arch, layout, WORK, stage)
        experts = layout.ep * plan.expert_params
        cut = [param for chunk in plan.chunks for param in chunk if not param.mapping.is_expert]
        whole = sum(p.numel * (layout.tp if _is_cut(p.mapping.role, len(p.shape)) else 1) for p in cut)
        held += experts + whole
    copies = layout.pp > 1 and bool(arch.mtp_layers or arch.tied_embeddings)  # of the embedding, on the last stage
    padding = (layout.padded_vocab(arch) - arch.vocab_size) * arch.hidden_size * 2
    assert held == arch.total_params + arch.mtp_params() + copies * arch.embedding_params + padding


def _is_cut(role: str, axes: int) -> bool:
    if role.startswith("mamba_"):
        return role != "mamba_norm"
    return role not in ("router", "query_down", "kv_down", "narrowed", "widened") and (axes > 1 or role == "sinks")


@pytest.mark.parametrize(
    ("name", "tokens", "tflops"),
    [
        ("gpt_oss_120b", 28672, 934),  # Megatron-Bridge, 26.08, GB200
        ("deepseek_v3", 6304, 1640),  # 26.06.01, GB300
        ("deepseek_v3_without_mtp", 3848, 961),  # 25.11, GB300
        ("kimi_k2", 5328, 1088),  # 26.04.01, GB300
    ],
)
def test_flops_are_those_that_nvidia_counts(name: str, tokens: float, tflops: float) -> None:
    assert flops_per_token(shape(name), 4096, causal=True) == pytest.approx(tflops * 1e12 / tokens, rel=0.01)


def test_a_window_hides_tokens_and_time() -> None:
    assert mean_context(4096) == mean_context(4096, 4096) == mean_context(4096, 9999) == 2048
    assert mean_context(4096, 128) == 126
    arch = shape("gpt_oss_120b")
    assert [arch.window_of(layer) for layer in range(4)] == [128, None, 128, None]
    full = replace(arch, window_pattern=(False,) * 36)
    layout, work = parse_layout("ep=64", 64), replace(WORK, seq_length=8192)
    h100, machine = known_gpu("h100"), PlanRequest(arch, known_gpu("h100"), 64, work, 1e9).model.machine
    times = [ThroughputModel(each, h100, machine).step(layout, work).attention for each in (arch, full)]
    assert times[0] / times[1] == pytest.approx((18 * 127 + 18 * 4096) / (36 * 4096), rel=1e-3)


def test_activations_of_latent_attention_and_of_a_mamba_mixer_by_hand() -> None:
    work, layout = replace(WORK, seq_length=1, global_batch=1), parse_layout("tp=1", 1)
    held = layer_bytes(shape("deepseek_v3"), layout, work, moe=False, fp8=False)
    heads = 2 * 128 * 192 + 2 * 128 * 128  # query and key; value and output
    assert held.plain == 2 * (4 * 7168 + heads + 2 * (1536 + 512) + 3 * 18432) + 4 * 128
    held = layer_bytes(shape("nemotron_h_8b"), layout, work, moe=False, fp8=False, parts="M")
    inner, states = 128 * 64, 8 * 128
    assert held.plain == 2 * (2 * 4096 + 2 * inner + 2 * states + 128 + 3 * inner)
    held = layer_bytes(shape("nemotron_3_super"), layout, replace(work, imbalance=1.0), moe=True, fp8=False, parts="-")
    assert held.routed == 22 * 2 * (1024 + 2 * 2688)
    held = layer_bytes(shape("nemotron_h_8b"), layout, work, moe=False, fp8=False, parts="-")
    assert held.plain == 2 * (2 * 4096 + 2 * 21504)


def _rows(title: str) -> list[Published]:
    return [row for row in published_rows() if row.name.startswith(title)]


@pytest.mark.parametrize("title", ["DeepSeek-V3", "Nemotron 3 Nano", "GPT-OSS 120B", "Grok-1", "Kimi K2"])
def test_published_speeds_are_predicted_without_a_constant_of_their_own(title: str) -> None:
    misses = [abs(row.predicted() / row.tokens_per_s_per_gpu - 1) for row in _rows(title)]
    assert statistics.median(misses) < 0.1
    assert all(row.later for row in _rows(title) if not row.name.startswith("GPT-OSS"))


def test_layers_that_no_stages_share_out_evenly_get_a_shorter_last_chunk() -> None:
    arch, gpu = shape("deepseek_v3"), known_gpu("gb200")
    work = replace(WORK, precision="mxfp8", low_params=True, gradients="bf16")
    best = search(PlanRequest(arch, gpu, 256, work, 1e9), 1)[0]
    assert best.layout.pp > 1
    assert (61 + best.layout.loss) % (best.layout.pp * best.layout.vp) == 0
    chunks = [chunk for stage in range(best.layout.pp) for chunk in best.layout.chunks(arch, stage)]
    assert sorted(layer for chunk in chunks for layer in chunk.layers) == list(range(61))
    with pytest.raises(SpecError, match="loss: got 3, expected 0 or 1"):
        check_layout(parse_layout("pp=8,ep=8,loss=3", 64), replace(arch, planned_only=False), WORK)
    with pytest.raises(SpecError, match=r"loss: got 3, expected at most the layers of a chunk \(2\)"):
        check_layout(parse_layout("pp=8,vp=4,ep=32,loss=3", 256), arch, WORK)


def test_nvidias_recipes_of_mamba_layers_overlap_no_experts() -> None:
    gpu, layout = known_gpu("gb300"), parse_layout("ep=8", 8)
    work = replace(WORK, precision="mxfp8")
    names = ("nemotron_3_nano", "gpt_oss_20b")
    assert [usual_overlap(shape(name), gpu, layout, work, "none", "mcore-0.18") for name in names] == [
        (),
        ("ep", "launch"),
    ]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gpt_oss_120b", {"layer_types": ["linear_attention"] * 36}, "layer_types: .*sliding_attention or full_atten"),
        ("gpt_oss_120b", {"layer_types": ["full_attention"]}, "layer_types: got .*expected 36, one a layer"),
        ("deepseek_v3", {"layer_types": ["linear_attention"] * 61}, "layer_types: .*expected full_attention alone"),
        (
            "deepseek_v3",
            {"architectures": ["DeepseekV32ForCausalLM"]},
            "DeepseekV32.*Gemma2ForCausalLM, DeepseekV3F",
        ),
        ("deepseek_v3", {"architectures": None, "model_type": "kimi_linear"}, "got model_type kimi_linear"),
        ("deepseek_v3", {"first_k_dense_replace": 61}, "first_k_dense_replace: got 61, expected at most 60"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank: got 0, expected a positive whole number"),
        ("nemotron_3_super", {"mtp_hybrid_override_pattern": "*-"}, "mtp_hybrid_override_pattern: got '.-', expected"),
        ("nemotron_3_super", {"moe_latent_size": -1}, "moe_latent_size: got -1, expected a whole number"),
        (
            "nemotron_3_nano",
            {"hybrid_override_pattern": "MG*E"},
            "hybrid_override_pattern: got 'MG.E', expected Mamba",
        ),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(name: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        architecture_from_config(public_config(name) | changes, to_plan=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_oss_20b", "GptOssForCausalLM with windows in some layers and sinks"),
        ("deepseek_v3", "DeepseekV3ForCausalLM with latent attention"),
        ("grok_1", "Grok1ModelForCausalLM with capped scores"),
        ("nemotron_3_nano", "NemotronHForCausalLM with experts"),
    ],
)
def test_nothing_but_a_plan_takes_them(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"architectures: got {reason}.*, which nemo-upcycle plan alone knows"):
        architecture_from_config(public_config(name))


def test_the_wide_tensors_of_latent_attention_are_recomputed_for_little_time() -> None:
    arch, layout = shape("deepseek_v3"), parse_layout("ep=8", 8)
    work, again = (replace(WORK, seq_length=4096, global_batch=8, recompute=kind) for kind in ("none", "mla_up_proj"))
    plain, freed = (layer_bytes(arch, layout, each, moe=False, fp8=False).plain for each in (work, again))
    assert plain - freed == 4096 * 2 * 128 * (192 + 192 + 128)
    request = PlanRequest(arch, known_gpu("h100"), 8, WORK, 1e9)
    assert "mla_up_proj" in request.recomputes
    assert "mla_up_proj" not in replace(request, arch=shape("gpt_oss_20b")).recomputes
    times = [request.model.step(layout, each) for each in (work, again)]
    up = 2 * 4096 * (1536 * 128 * 192 + 512 * 128 * 256) / (0.58 * 989e12)
    assert times[1].gemm - times[0].gemm == pytest.approx(62 * up, rel=0.01)
