"""How fast a training step was, in the units that papers use: tokens/s, TFLOP/s and MFU of a GPU, memory of the card.

The FLOPs are those of `models.flops.flops_per_token`, in both conventions, always labelled: `full` counts the whole
square of attention scores, as arXiv 2412.09952 does (its 46.8 % MFU at 462.8 TFLOP/s), `causal` its lower half, as
newer NVIDIA pages do. Model FLOPs only: recomputation, padding and dropped tokens do not count.

What is true and what the paper prints, Table 1, of Llama 3 8B with eight experts, top-2:

    parameters         47.49B, 13.67B active    printed: 34.4B, 11.8B; two of the three matrices of each extra expert
    FLOPs a sequence   7.515e14                 printed: 7.5e14; forward and backward of 8192 tokens, full attention
    the dense parent   8.03B, 4.744e14          printed: 8B, 4.7e14
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.planning.hardware import gpu_of_device


CONVENTIONS = ("full", "causal")


def peaks_of(gpu: str) -> dict[str, float]:
    """Return the dense peaks of a card in TFLOP/s, `bf16` and, if it has it, `fp8`; nothing for a card not known.

    The planner's cards are known (`conf/planning/gpus.yaml`), in SXM form: PCIe and NVL ones have lower peaks.

    Args:
        gpu: a name there, or the driver's name of a card.

    Example:
        >>> peaks_of("NVIDIA H100 80GB HBM3")
        {'bf16': 989, 'fp8': 1979}
    """
    card = gpu_of_device(gpu)
    if card is None:
        return {}
    return {"bf16": card.bf16_tflops} | ({"fp8": card.fp8_tflops} if card.fp8_tflops else {})


@dataclass(frozen=True)
class Throughput:
    """Turns tokens and seconds into rates.

    Args:
        architecture: of the whole model.
        seq_length: s, tokens of a sequence.
        gpus: ranks that share the work.
        peak_tflops: of one of them, by precision; empty where there is no MFU to be stated.

    Example:
        >>> rates = Throughput(llama3_8b_e8t2, 8192, gpus=128, peak_tflops=peaks_of("H100")).of(645_760, 1.0)
        >>> rates["tflops_per_gpu"]["full"], rates["mfu"]["bf16"]["full"]  # doctest: +SKIP
        (462.8, 0.468)
    """

    architecture: Architecture
    seq_length: int
    gpus: int
    peak_tflops: dict[str, float]

    def flops_per_token(self) -> dict[str, float]:
        """Return the FLOPs of training on one token, by convention."""
        return {
            name: flops_per_token(self.architecture, self.seq_length, causal=name == "causal") for name in CONVENTIONS
        }

    def of(self, tokens: int, seconds: float) -> dict[str, Any]:
        """Return the rates of a step.

        Args:
            tokens: of the step, over all ranks.
            seconds: it took.

        Returns:
            `tokens_per_s`, `tokens_per_s_per_gpu`, `tflops_per_gpu` by convention and, where the peak is known, `mfu`
            by precision of the peak and convention, as a share of 1.
        """
        rate = tokens / max(seconds, 1e-9)
        tflops = {name: rate / self.gpus * flops / 1e12 for name, flops in self.flops_per_token().items()}
        rates: dict[str, Any] = {
            "tokens_per_s": round(rate, 1),
            "tokens_per_s_per_gpu": round(rate / self.gpus, 1),
            "tflops_per_gpu": {name: float(f"{value:.5g}") for name, value in tflops.items()},
        }
        if self.peak_tflops:
            rates["mfu"] = {
                precision: {name: round(value / peak, 5) for name, value in tflops.items()}
                for precision, peak in self.peak_tflops.items()
            }
        return rates

    def describe(self) -> str:
        """Return one line that says what the rates are counted with."""
        arch, flops = self.architecture, self.flops_per_token()
        unit, letter = (1e9, "B") if arch.total_params >= 1e9 else (1e6, "M")
        peaks = ", ".join(f"{peak:g} TFLOP/s {name.upper()}" for name, peak in self.peak_tflops.items())
        return (
            f"{arch.total_params / unit:.2f}{letter} parameters, {arch.active_params / unit:.2f}{letter} active; "
            f"{flops['full'] / 1e9:.3g} GFLOP a token (full attention), {flops['causal'] / 1e9:.3g} (causal half); "
            f"peak of a GPU: {peaks or 'not known, no MFU'}"
        )


def memory_gib() -> tuple[float, float | None]:
    """Return the most memory that this rank has held, and what its card has, in GiB.

    On a GPU it is what PyTorch's allocator reserved, the number that an out-of-memory error is about; NCCL's and
    cuBLAS's own buffers are not in it. Without one it is the process's resident memory, and there is no card.
    """
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, None
    card = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return torch.cuda.max_memory_reserved() / 2**30, card / 2**30
