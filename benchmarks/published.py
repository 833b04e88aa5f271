"""Published throughput and memory, in a form that can be compared with predictions.

The throughput is in `published.yaml`, and the memory in `conf/planning/memory.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.planning.hardware import DEFAULT_SOFTWARE, Gpu, known_gpu, known_machine, known_shape, read_data
from nemo_upcycle.planning.layout import Layout, parse_layout
from nemo_upcycle.planning.memory import GIB, worst_memory
from nemo_upcycle.planning.rules import check_layout
from nemo_upcycle.planning.search import PlanRequest, evaluate_layout
from nemo_upcycle.planning.throughput import ThroughputModel
from nemo_upcycle.planning.workload import FORCED_IMBALANCE, USUAL_IMBALANCE, Workload
from nemo_upcycle.spec import UpcycleSpec


@dataclass(frozen=True)
class Published:
    """One row of `published.yaml`, which explains the fields.

    Args:
        tokens_per_s_per_gpu: measured speed; if only TFLOP/s or MFU is published, the speed is computed with
            `models.flops.flops_per_token`.
        fitted: whether the constants of `Machine` were fitted on this row.
        sets: constant of `Machine` that was chosen by hand for this row, if any.
        software: a key of `planning.hardware.SOFTWARE`.
    """

    name: str
    gpu: Gpu
    arch: Architecture
    layout: Layout
    work: Workload
    tokens_per_s_per_gpu: float
    source: str
    assumed: str
    fitted: bool
    sets: str
    software: str

    @property
    def card(self) -> str:
        """First word of the GPU's name."""
        return self.gpu.name.partition(" ")[0]

    @property
    def is_unseen(self) -> bool:
        """True if this row was used neither to fit nor to choose a constant."""
        return not self.fitted and not self.sets

    def predicted(self, reached: dict[str, float] | None = None) -> float:
        """Predict tokens/s/GPU with all settings that the source gives.

        Args:
            reached: constants that replace the GPU's constants.
        """
        gpu = replace(self.gpu, reached=self.gpu.reached | (reached or {}))
        model = ThroughputModel(self.arch, gpu, known_machine(gpu, self.software))
        step_tokens = self.work.global_batch * self.work.seq_length
        return step_tokens / model.step(self.layout, self.work).total / self.layout.gpus

    def predicted_as_asked(self) -> float:
        """Predict tokens/s/GPU with only model, layout, batch, precision and software from the source."""
        work = replace(self.work, recompute="none", gradients="bf16", low_params=self.work.numbers.fp8)
        request = PlanRequest(
            self.arch, self.gpu, self.layout.gpus, work, 1e9, self.software, usual=("dispatcher", "overlap")
        )
        return evaluate_layout(request, self.layout).tokens_per_s_per_gpu


@dataclass(frozen=True)
class Peak:
    """One row of `conf/planning/memory.yaml`: a run and its published memory (GiB). Unpublished values are None."""

    row: Published
    allocated_gib: float | None
    peak_gib: float

    def predicted(self) -> tuple[float, float]:
        """Predict the memory between steps and at the peak (GiB), as PyTorch counts it."""
        memory = worst_memory(self.row.arch, self.row.layout, self.row.work)[1]
        return memory.states / GIB, memory.peak / GIB


def published_rows() -> list[Published]:
    """Return every row of throughput, in the order of the file."""
    return [_row(values) for values in _data()["rows"]]


def published_peaks() -> list[Peak]:
    """Return every row of memory, in the order of the file."""
    rows = read_data("memory.yaml")["rows"]
    return [Peak(_row(values), values.get("allocated_gib"), values["peak_gib"]) for values in rows]


def shape(name: str) -> Architecture:
    """Return the architecture of a model in `published.yaml`, or of a recipe's parent in `parents.yaml`."""
    if name not in _data()["shapes"]:
        return known_shape(name)
    values = _data()["shapes"][name].items()
    return Architecture(**{key: tuple(value) if isinstance(value, list) else value for key, value in values})


@cache
def _data() -> Any:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _row(values: dict[str, Any]) -> Published:
    arch, gpu = shape(values["model"]), known_gpu(values.get("gpu", "h100"))
    if "experts" in values:
        arch = arch.upcycled(UpcycleSpec(num_experts=values["experts"], top_k=2))
    routing = values.get("routing", "balanced")
    work = Workload(
        seq_length=values["seq"],
        global_batch=values["batch"],
        capacity_factor=values.get("cf"),
        pad=values.get("pad", False),
        imbalance=FORCED_IMBALANCE if routing == "balanced" else USUAL_IMBALANCE,
        precision=values.get("precision", "bf16"),
        low_params=values.get("low_params", False),
        gradients="bf16",
        recompute=values.get("recompute", "none"),
        dispatcher=values.get("dispatcher", "alltoall"),
        routing=routing,
        overlap=tuple(values.get("overlap", ())),
    )
    layout = parse_layout(values["layout"], values["gpus"])
    check_layout(layout, arch, work)
    measured = values.get("tokens", 0.0)
    if "tflops" in values or "mfu" in values:
        tflops = values.get("tflops") or values["mfu"] / 100 * gpu.bf16_tflops
        measured = tflops * 1e12 / flops_per_token(arch, work.seq_length, causal=values.get("causal", False))
    return Published(
        name=values["name"],
        gpu=gpu,
        arch=arch,
        layout=layout,
        work=work,
        tokens_per_s_per_gpu=measured,
        source=values["source"],
        assumed=values.get("assumed", ""),
        fitted=values.get("fit", True),
        sets=values.get("sets", ""),
        software=values.get("software", DEFAULT_SOFTWARE),
    )
