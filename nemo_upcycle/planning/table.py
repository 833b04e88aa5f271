"""Plans as text for a terminal (a table, or the arithmetic) and as JSON values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.planning.memory import ASSUMPTIONS, GIB
from nemo_upcycle.planning.search import LayoutEstimate
from nemo_upcycle.utils.console import in_columns


#: Functions that write the cells of a plan, by the column's header, in the order of the table. `row_values` has more
#: values.
_CELLS: dict[str, Callable[[LayoutEstimate], str]] = {
    "layout": lambda plan: plan.layout.sizes,
    "GiB": lambda plan: _gib(plan.memory.total),
    "fits": lambda plan: plan.verdict,
    "tok/s": lambda plan: f"{plan.tokens_per_s_per_gpu:.0f}",
    "MFU": lambda plan: f"{100 * plan.mfu:.1f}%",
    "hours": lambda plan: f"{plan.hours:.1f}",
    "cost": lambda plan: "-" if plan.cost is None else f"{plan.cost:.0f}",
    "recompute": lambda plan: plan.work.recompute,
}


def table_text(plans: list[LayoutEstimate]) -> str:
    """Return plans as a table with one row per plan, and a column of costs if the price is known."""
    names = [name for name in _CELLS if name != "cost" or plans[0].cost is not None]
    rows = [[str(number), *(_CELLS[name](plan) for name in names)] for number, plan in enumerate(plans, 1)]
    right = [0, *(1 + names.index(name) for name in names if name not in ("layout", "recompute", "fits"))]
    return "\n".join(in_columns([["#", *names], *rows], right=right))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def row_values(plan: LayoutEstimate, command: str | None, why_none: str) -> dict[str, Any]:
    """Return a plan as JSON values.

    Args:
        plan: the plan.
        command: command that trains the plan; None if there is no such command.
        why_none: reason why no recipe has the plan's settings; "" if a recipe has them.
    """
    layout = plan.layout
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vp", "cp", "ep", "etp", "dp", "expert_dp")}
    work = plan.work
    names = ("recompute", "dispatcher", "gradients", "low_params")
    settings = {name: getattr(work, name) for name in names}
    settings |= {"overlap": list(work.overlap), "software": plan.request.software}
    return {
        "layout": sizes | {"micro_batch": layout.micro_batch} | settings,
        "memory_gib": plan.memory.gib(),
        "fits": plan.verdict,
        "tokens_per_s_per_gpu": round(plan.tokens_per_s_per_gpu, 1),
        "tflops_per_gpu": {
            "full": round(plan.tflops_per_gpu(causal=False), 1),
            "causal": round(plan.tflops_per_gpu(causal=True), 1),
        },
        "mfu": round(plan.mfu, 4),
        "peak_tflops": plan.peak_tflops,
        "bound_by": plan.time.bound_by,
        "hours": round(plan.hours, 2),
        "cost": None if plan.cost is None else round(plan.cost, 2),
        "checkpoint_gib": round(plan.checkpoint_gib, 1),
        "command": command,
        "no_command": why_none,
    }


def routing_line(plan: LayoutEstimate) -> str:
    """Describe a plan's assumption about routing and the cost of natural routing; "" if the cost is negligible."""
    other = replace(plan, work=replace(plan.work, routing="natural"))
    slower = other.time.total / plan.time.total - 1
    if plan.work.routing == "natural":
        return "Speed with natural routing, as in training."
    if slower < 0.005:
        return ""
    return (
        f"Speed with balanced routing, as benchmarks force it. Natural routing, as in training, takes about "
        f"{100 * slower:.0f} % longer (--routing natural)."
    )


def model_line(arch: Architecture, seq_length: int) -> str:
    """Return a line with a model's size and its FLOPs per token, with full and with causal attention."""
    full, causal = (flops_per_token(arch, seq_length, causal=causal) for causal in (False, True))
    text = (
        f"{arch.total_params / 1e9:.2f}B parameters, {arch.active_params / 1e9:.2f}B active; training on a token of a "
        f"sequence of {seq_length}: {full:.3e} FLOPs (full attention), {causal:.3e} (causal half)"
    )
    if (arch.total_params, arch.active_params) == (47_491_321_856, 13_668_454_400):
        text += (
            "\nThe paper (arXiv 2412.09952, Table 1) prints 34.4B and 11.8B: it counts only two of the three matrices"
            " of each additional expert. Its FLOPs agree with this model."
        )
    return text


def explanation(plan: LayoutEstimate) -> str:
    """Return the arithmetic of a plan as text: memory and time by component, and the assumptions."""
    layout, work, request, step = plan.layout, plan.work, plan.request, plan.time
    count, gpu = layout.micro_batches(work.global_batch), request.gpu
    step_tokens = work.global_batch * work.seq_length
    lines = [
        f"layout {layout}: {request.gpus} GPUs = tp {layout.tp} x cp {layout.cp} x dp {layout.dp} x pp {layout.pp}"
        f" = etp {layout.etp} x ep {layout.ep} x expert dp {layout.expert_dp} x pp {layout.pp}",
        f"step: {work.global_batch} sequences x {work.seq_length} = {step_tokens:,} tokens;"
        f" {count} micro-batches of {layout.micro_batch} on each of {layout.dp} pipelines",
        "",
        f"GiB of the fullest rank (pipeline stage {plan.worst[0]}), of {gpu.memory_gib} on {gpu.name}:",
        *(f"  {name:<12}{value:9.3f}" for name, value in plan.memory.gib().items()),
        "",
        "seconds of a step:",
        *(f"  {name:<10}{value:10.4f}  {100 * value / step.total:5.1f}%" for name, value in step.to_dict().items()),
        f"bubble = (pp - 1) / (micro-batches x vp) = {layout.pp - 1} / ({count} x {layout.vp})"
        f" = {(layout.pp - 1) / (count * layout.vp):.4f} of the time of the micro-batches",
        "",
        f"{step_tokens:,} tokens / {step.total:.4f} s / {request.gpus} GPUs"
        f" = {plan.tokens_per_s_per_gpu:.1f} a second",
        f"x FLOPs of a token = {plan.tflops_per_gpu(causal=False):.1f} TFLOP/s (full attention),"
        f" {plan.tflops_per_gpu(causal=True):.1f} (causal half)",
        f"MFU = {plan.tflops_per_gpu(causal=False):.1f} / {plan.peak_tflops:g} (the peak of {plan.peak_of})"
        f" = {100 * plan.mfu:.1f}%",
        f"{request.tokens:.3g} tokens = {plan.hours:.1f} h; full checkpoint {plan.checkpoint_gib:.0f} GiB"
        " (14 bytes for each parameter)",
        "",
        "assumed:",
        *(f"  {text}" for text in ASSUMPTIONS),
    ]
    return "\n".join(lines)
