"""Throughput in the units of papers: one formula gives the paper's Tables 1 and 2."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.monitoring.step_metrics import Throughput, peaks_of
from tests.models import LLAMA3_8B


SEQUENCE = 8192
DENSE = architecture_from_config(LLAMA3_8B)
MOE = DENSE.upcycled(UpcycleSpec(num_experts=8, top_k=2))


def test_parameters_and_flops_match_table_1_of_the_paper() -> None:
    """FLOPs are as in the table. The table's sizes count only two of the three FFN matrices of each added expert."""
    assert f"{flops_per_token(DENSE, SEQUENCE, causal=False) * SEQUENCE:.1e}" == "4.7e+14"
    assert f"{flops_per_token(MOE, SEQUENCE, causal=False) * SEQUENCE:.1e}" == "7.5e+14"
    assert flops_per_token(MOE, SEQUENCE, causal=True) * SEQUENCE == pytest.approx(6.988e14, rel=1e-3)
    two_of_three = 2 * DENSE.ffn_size * DENSE.hidden_size * DENSE.num_layers
    assert (DENSE.total_params + 7 * two_of_three) / 1e9 == pytest.approx(34.4, abs=0.1)
    assert (DENSE.total_params + two_of_three) / 1e9 == pytest.approx(11.8, abs=0.05)


def test_the_output_layer_counts_tied_or_not() -> None:
    for arch in (MOE, DENSE):
        tied = replace(arch, tied_embeddings=True)
        assert tied.total_params < arch.total_params
        for causal in (False, True):
            found = [flops_per_token(one, SEQUENCE, causal=causal) for one in (arch, tied)]
            assert found[0] == found[1]


@pytest.mark.parametrize(
    ("tokens_per_s_per_gpu", "tflops", "mfu"), [(5045, 462.8, 0.468), (4224, 387.5, 0.392), (4271, 391.8, 0.396)]
)
def test_mfu_is_that_of_table_2(tokens_per_s_per_gpu: int, tflops: float, mfu: float) -> None:
    rates = Throughput(MOE, SEQUENCE, 128, peaks_of("NVIDIA H100 80GB HBM3")).of(tokens_per_s_per_gpu * 128 * 10, 10.0)
    assert rates["tokens_per_s_per_gpu"] == tokens_per_s_per_gpu
    assert rates["tflops_per_gpu"]["full"] == pytest.approx(tflops, rel=1e-3)
    assert rates["mfu"]["bf16"]["full"] == pytest.approx(mfu, abs=5e-4)
    assert rates["mfu"]["fp8"]["full"] == pytest.approx(rates["mfu"]["bf16"]["full"] * 989 / 1979, rel=1e-3)
    ratio = rates["tflops_per_gpu"]["causal"] / rates["tflops_per_gpu"]["full"]
    assert ratio == pytest.approx(6.988 / 7.515, rel=1e-3)


def test_a_card_is_found_by_the_drivers_name() -> None:
    assert peaks_of("NVIDIA H100 80GB HBM3")["bf16"] == 989
    assert peaks_of("h100") == {"bf16": 989, "fp8": 1979}
    # The peaks of these cards are lower, and this package does not know the numbers.
    assert peaks_of("NVIDIA H100 PCIe") == peaks_of("NVIDIA H100 NVL") == {}
    assert "fp8" not in peaks_of("NVIDIA A100-SXM4-80GB")
    assert peaks_of("a card of tomorrow") == {}


def test_an_unknown_card_has_no_mfu() -> None:
    throughput = Throughput(MOE, SEQUENCE, 8, {})
    assert "mfu" not in throughput.of(1000, 1.0)
    work = "91.7 GFLOP a token (full attention), 85.3 (causal half); peak of a GPU: not known, no MFU"
    assert throughput.describe() == f"47.49B parameters, 13.67B active; {work}"
