"""Published throughput of H100s, in a form that predictions can be compared with: `published.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.planning.hardware import DEFAULT_SOFTWARE, Machine, known_gpu, known_shape, known_software
from nemo_upcycle.planning.layout import Layout, parse_layout
from nemo_upcycle.planning.rules import check_layout
from nemo_upcycle.planning.throughput import ThroughputModel
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec


@dataclass(frozen=True)
class Published:
    """One row of `published.yaml`, which explains the fields.

    Args:
        tokens_per_s_per_gpu: measured; from TFLOP/s or MFU by the formula of `models.flops.flops_per_token`.
        fitted: whether the constants of `Machine` were fitted on it.
        sets: a constant of `Machine` that was chosen by hand for this row, if any.
        software: one of `planning.hardware.SOFTWARE`.
    """

    name: str
    arch: Architecture
    layout: Layout
    work: Workload
    tokens_per_s_per_gpu: float
    source: str
    assumed: str
    fitted: bool
    sets: str = ""
    software: str = DEFAULT_SOFTWARE

    def predicted(self, machine: Machine) -> float:
        """Return the predicted tokens/s/GPU.

        Args:
            machine: of the first software, which others differ from.
        """
        model = ThroughputModel(self.arch, known_gpu("h100"), known_software(self.software, machine))
        step_tokens = self.work.global_batch * self.work.seq_length
        return step_tokens / model.step(self.layout, self.work).total / self.layout.gpus


def published_rows() -> list[Published]:
    """Return every row, in the order of the file."""
    return [_row(values) for values in _data()["rows"]]


def shape(name: str) -> Architecture:
    """Return the architecture of a model by its name here or, for the recipes' parents, in `recipes.yaml`."""
    return Architecture(**_data()["shapes"][name]) if name in _data()["shapes"] else known_shape(name)


@cache
def _data() -> Any:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def _row(values: dict[str, Any]) -> Published:
    arch = shape(values["model"])
    if "experts" in values:
        arch = arch.upcycled(UpcycleSpec(num_experts=values["experts"], top_k=2))
    work = Workload(
        seq_length=values["seq"],
        global_batch=values["batch"],
        capacity_factor=values.get("cf"),
        pad=values.get("pad", False),
        precision=values.get("precision", "bf16"),
        recompute=values.get("recompute", "none"),
        dispatcher=values.get("dispatcher", "alltoall"),
        routing=values.get("routing", "balanced"),
        overlap=tuple(values.get("overlap", ())),
    )
    layout = parse_layout(values["layout"], values["gpus"])
    check_layout(layout, arch, work)
    measured = values.get("tokens")
    if measured is None:
        tflops = values.get("tflops") or values["mfu"] / 100 * known_gpu("h100").bf16_tflops
        measured = tflops * 1e12 / flops_per_token(arch, work.seq_length, causal=values.get("causal", False))
    assumed, fitted = values.get("assumed", ""), values.get("fit", True)
    sets, software = values.get("sets", ""), values.get("software", DEFAULT_SOFTWARE)
    return Published(values["name"], arch, layout, work, measured, values["source"], assumed, fitted, sets, software)
