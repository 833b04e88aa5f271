"""The speeds that a GPU and its machine reach, and the known GPUs and parents, read from `conf/planning`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import DeltaLayers
from nemo_upcycle.planning.workload import FORCED_IMBALANCE, Precision
from nemo_upcycle.utils.conf import packaged, read_yaml


@dataclass(frozen=True)
class Gpu:
    """A GPU and the machine around it; `conf/planning/gpus.yaml` explains the fields."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    hbm_gb_s: float
    nvlink_gb_s: float
    network_gb_s: float
    per_node: int
    nvlink_gpus: int
    fp4_tflops: float | None = None
    reached: dict[str, float] = field(default_factory=dict, hash=False)

    def peak_tflops(self, numbers: Precision) -> float:
        """Return the GPU's peak for products in a precision, or its BF16 peak if no separate peak is known."""
        return {8: self.fp8_tflops, 4: self.fp4_tflops}.get(numbers.bits) or self.bf16_tflops

    @property
    def is_blackwell(self) -> bool:
        """Whether the GPU multiplies in MXFP8 and FP4."""
        return self.fp4_tflops is not None

    def has(self, numbers: Precision) -> bool:
        """Return whether the GPU multiplies in a precision."""
        return self.is_blackwell if numbers.blackwell else not numbers.fp8 or self.fp8_tflops is not None


@dataclass(frozen=True)
class Machine:
    """The fractions of its peak speeds that an H100 reaches, and launch times. `Gpu.reached` has other GPUs' values.

    `gemm`, `gemm_fp8`, `moe_us` and `imbalance` are fitted to measurements. The other values are chosen by hand.

    Args:
        gemm: fraction of the peak that large matrix products reach, at their actual clock rate.
        gemm_fp8: `gemm` for FP8, including scaling and transposing. For MXFP8, the value excludes casts, which are
            counted separately.
        gemm_fp4: `gemm` for NVFP4, without casts.
        ragged: factor on the three values above for a matrix whose sides are not multiples of 128.
        attention: fraction of the BF16 peak that flash attention reaches over forward and backward.
        memory: fraction of the HBM bandwidth.
        link: fraction of the bandwidth of NVLink and of the network.
        tp_hidden: fraction of tensor parallelism's traffic that matrix products hide if the traffic is overlapped.
        ep_hidden: fraction of the experts' traffic that another micro-batch's computation hides if the traffic is
            overlapped.
        layer_us: kernel launches and host work of one layer and micro-batch (microseconds).
        moe_us: time of a layer's router and dispatcher, which wait for the number of tokens of each expert
            (microseconds).
        expert_us: time of every expert of a rank except the first (microseconds), because grouped products are
            launched expert by expert.
        uneven_expert_us: `expert_us` if experts are not padded. The host has then waited for the numbers of tokens, so
            no earlier kernel hides the host's work.
        uneven_fp8_expert_us: `uneven_expert_us` in FP8, where each expert's tensors are measured, cast and transposed.
        uneven_mx_expert_us: `uneven_expert_us` in MXFP8 and NVFP4, whose scales need no second pass.
        imbalance: token slots of the busiest expert rank divided by the mean over the ranks, if experts are not padded
            to a capacity and routing is balanced, as in benchmarks. The other ranks wait for the busiest rank.
        uneven: growth of `imbalance` under natural routing, for each doubling of the experts beyond four.
    """

    gemm: float = 0.58
    gemm_fp8: float = 0.54
    gemm_fp4: float = 0.4
    ragged: float = 1.0
    attention: float = 0.5
    memory: float = 0.85
    link: float = 0.7
    tp_hidden: float = 0.5
    ep_hidden: float = 0.7
    layer_us: float = 200.0
    moe_us: float = 620.0
    expert_us: float = 50.0
    uneven_expert_us: float = 250.0
    uneven_fp8_expert_us: float = 1200.0
    uneven_mx_expert_us: float = 400.0
    imbalance: float = FORCED_IMBALANCE
    uneven: float = 0.12

    def uneven_us(self, numbers: Precision) -> float:
        """Return the launch time of an expert that is not padded (microseconds)."""
        if numbers.blackwell:
            return self.uneven_mx_expert_us
        return self.uneven_fp8_expert_us if numbers.fp8 else self.uneven_expert_us

    def waits_for(self, experts: int, *, natural: bool) -> float:
        """Return the token slots of the busiest expert rank divided by the mean over the ranks.

        Args:
            experts: experts of a layer.
            natural: whether the router chooses the experts, as in training; if False, the router is forced to balance
                the experts.
        """
        added = self.uneven * max(0.0, math.log2(max(experts, 1) / 4)) if natural else 0.0
        return self.imbalance * (1 + added)


#: Values of `Machine` that differ between versions of Megatron-Core, by version. From 0.17 on, the host neither waits
#: for the numbers of tokens nor works expert by expert.
SOFTWARE: dict[str, dict[str, float]] = {
    "mcore-0.15": {},
    "mcore-0.16": {"uneven_fp8_expert_us": 650.0, "uneven_mx_expert_us": 200.0},
    "mcore-0.17": {
        "moe_us": 300.0,
        "uneven_expert_us": 50.0,
        "uneven_fp8_expert_us": 390.0,
        "uneven_mx_expert_us": 200.0,
    },
}
SOFTWARE["mcore-0.18"] = SOFTWARE["mcore-0.17"]
#: The version in NeMo 2.7, and the version that is assumed for Megatron-Bridge (the newest).
DEFAULT_SOFTWARE, BRIDGE_SOFTWARE = "mcore-0.15", "mcore-0.18"


def known_machine(gpu: Gpu, software: str) -> Machine:
    """Return the fractions of a GPU's peaks that a version of Megatron-Core reaches.

    Args:
        gpu: the GPU.
        software: one of `SOFTWARE`.
    """
    return replace(Machine(**gpu.reached), **SOFTWARE[software])


@lru_cache(maxsize=8)
def read_data(name: str) -> Any:
    """Read a file of `conf/planning` as plain values."""
    return read_yaml(packaged("planning") / name)


def gpu_names() -> list[str]:
    """Return the names of the known GPUs."""
    return list(read_data("gpus.yaml"))


def known_gpu(name: str) -> Gpu:
    """Return a GPU by its name.

    Raises:
        SpecError: the name is not known.
    """
    known = read_data("gpus.yaml")
    if name not in known:
        raise SpecError.unknown("gpu", name, known)
    return Gpu(**known[name])


_OTHER_FORMS = ("pcie", "nvl", "laptop", "4090d")


def gpu_of_device(device: str) -> Gpu | None:
    """Return a GPU by the driver's name; None if the GPU is unknown or is a PCIe, NVL or laptop card.

    PCIe, NVL and laptop cards have lower peaks than the GPUs of `gpus.yaml`.

    Args:
        device: name of a device, such as `NVIDIA H100 80GB HBM3`, or name in `gpus.yaml`.
    """
    name = device.lower().replace(" ", "")
    known = max((key for key in gpu_names() if key in name), key=len, default=None)  # gb200 before b200
    return None if known is None or any(form in name for form in _OTHER_FORMS) else known_gpu(known)


@cache
def parents() -> dict[str, tuple[list[str], Architecture]]:
    """Read the addresses and the architecture of each dense parent in `conf/planning/parents.yaml`, by name."""
    return {name: (row["addresses"], _shape(dict(row["shape"]))) for name, row in read_data("parents.yaml").items()}


def _shape(values: dict[str, Any]) -> Architecture:
    if nets := dict(values.pop("delta", {})):
        every = nets.pop("attention_every")
        pattern = tuple((layer + 1) % every != 0 for layer in range(values["num_layers"]))
        values["delta"] = DeltaLayers(pattern=pattern, **nets)
    return Architecture(**values)


def known_shape(name: str) -> Architecture:
    """Return the architecture of a known dense parent by its name, such as `llama3_8b`."""
    return parents()[name][1]


def known_parent(address: str) -> Architecture | None:
    """Return the architecture of a dense parent by its address, or None if no recipe starts from the address.

    Example:
        >>> known_parent("asset://smollm2-135m").num_layers
        30
    """
    return next((shape for addresses, shape in parents().values() if address in addresses), None)
