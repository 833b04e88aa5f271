"""The rules for layouts: divisibility rules of Megatron-Core and NeMo, and rules of the dispatcher and of FP8.

If a layout breaks a rule, the error names the rule and the nearest change that makes the layout valid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import Any, NamedTuple

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning import hardware
from nemo_upcycle.planning.layout import Layout, divisors
from nemo_upcycle.planning.workload import Workload


_SIZES = ("tp", "pp", "vp", "cp", "ep", "etp", "micro_batch")
_SWITCHES = ("embedding", "loss")


class RuleViolation(NamedTuple):
    """A rule that a layout breaks: the setting, its value, the expected value."""

    name: str
    got: object
    expected: str


def check_layout(
    layout: Layout, arch: Architecture, work: Workload, software: str = hardware.DEFAULT_SOFTWARE
) -> None:
    """Check a layout against every rule.

    Args:
        layout: the layout.
        arch: the trained model's architecture.
        work: work of a step.
        software: version of Megatron-Core that trains, one of `hardware.SOFTWARE`.

    Raises:
        SpecError: the layout breaks a rule; the text names the rule and the nearest change that makes it valid.
    """
    if rule := first_violation(layout, arch, work, software):
        name, got, expected = rule
        raise SpecError(field=name, got=got, expected=expected, fix=_fix(name, layout, arch, work, software))


def neutral_work(layout: Layout) -> Workload:
    """Return a workload that obeys all rules about data, so that a layout can be checked without data."""
    sizes = max(1, layout.gpus) * max(1, layout.micro_batch) * max(1, layout.pp)
    return Workload(seq_length=16 * max(1, layout.tp) * max(1, layout.cp), global_batch=sizes)


def first_violation(
    layout: Layout, arch: Architecture, work: Workload, software: str = hardware.DEFAULT_SOFTWARE
) -> RuleViolation | None:
    """Return the first rule that a layout breaks, or None if the layout is allowed.

    Rules are checked one by one, because a later rule makes sense only if the earlier rules hold.
    """
    layout_rules = (
        _value_rules(layout),
        _heads_rules(layout, arch, software),
        _model_rules(layout, arch),
        _stage_rules(layout, arch),
        _rank_rules(layout),
    )
    return next(chain(*layout_rules, _data_rules(layout, work), _kernel_rules(layout, arch, work)), None)


def _value_rules(layout: Layout) -> Iterator[RuleViolation]:
    for name in ("gpus", *_SIZES, "first", "last"):
        if (value := getattr(layout, name)) is not None and value < 1:
            yield RuleViolation(name, value, "1 or more")
    for name in _SWITCHES:
        if (value := getattr(layout, name)) not in (0, 1):
            yield RuleViolation(name, value, "0 or 1")


def _heads_rules(layout: Layout, arch: Architecture, software: str) -> Iterator[RuleViolation]:
    """Yield the rule of attention: each rank has whole key-value heads, or several ranks share a head.

    Sharing a head needs Megatron-Core 0.16 or later. Sharing does not work with this package's norms over all heads
    (OLMo 2), which count each head once.
    """
    tp, groups = layout.tp, arch.num_kv_heads  # the key-value heads divide the heads
    if groups % tp == 0:
        return
    shares = tp % groups == 0 and arch.num_heads % tp == 0
    if shares and software != hardware.DEFAULT_SOFTWARE and not arch.wide_qk_norm:
        return
    expected = f"a divisor of the key-value heads ({groups}): {_listed(divisors(groups))}"
    if arch.wide_qk_norm:
        expected += f"; no multiple of {groups} works, because the query and key norms cover all heads"
    elif software != hardware.DEFAULT_SOFTWARE:
        expected += f"; or a multiple of them that divides the heads ({arch.num_heads})"
    elif shares:
        expected += "; multiples of it work only in Megatron-Bridge, with Megatron-Core 0.16 or newer"
    yield RuleViolation("tp", tp, expected)


def _model_rules(layout: Layout, arch: Architecture) -> Iterator[RuleViolation]:
    tensor: dict[str, int] = {}
    if arch.mamba:
        tensor["the Mamba layers' groups"] = arch.mamba.num_groups  # the groups divide the Mamba heads
    if arch.delta:
        tensor["the gated delta nets' heads of query and key"] = arch.delta.num_key_heads  # they divide value heads
    if arch.moe_layer_count < len(arch.layers_with("-")):
        tensor["the feed-forward size"] = arch.ffn_size
    if arch.shared_ffn_size:
        tensor["the shared experts' feed-forward size"] = arch.shared_ffn_size
    for what, number in tensor.items():
        yield from _divides("tp", layout.tp, number, what)
    if arch.delta and layout.cp > 1:  # each context-parallel rank gathers the sequence for some heads
        heads = arch.delta.num_key_heads
        yield from _divides(
            "<tp> x <cp>", layout.tp * layout.cp, heads, "the gated delta nets' heads of query and key"
        )
    if arch.num_experts:
        yield from _divides("ep", layout.ep, arch.num_experts, "num_experts")
        yield from _divides("etp", layout.etp, arch.expert_ffn_size or 1, "an expert's feed-forward size")
    elif layout.ep > 1:
        yield RuleViolation("ep", layout.ep, "1 for a dense model")
    if layout.ep == 1 and layout.etp != layout.tp:
        # If ep is 1, Megatron-Core treats experts as dense parameters, and sums their gradients over dp x cp.
        why = "Megatron-Core would sum gradients over the wrong ranks" if arch.num_experts else "there are no experts"
        yield RuleViolation("etp", layout.etp, f"<tp> ({layout.tp}) if <ep> is 1, because {why}")


def _stage_rules(layout: Layout, arch: Architecture) -> Iterator[RuleViolation]:
    if layout.vp > 1 and layout.pp == 1:
        yield RuleViolation("vp", layout.vp, "1 without pipeline stages (<pp>=1)")
    fixed = {name: count for name in ("first", "last") if (count := getattr(layout, name)) is not None}
    for name, count in fixed.items():
        if layout.pp == 1:
            yield RuleViolation(name, count, "none without pipeline stages (<pp>=1)")
        if layout.embedding or layout.loss:
            yield RuleViolation(name, count, "none together with <embedding>=1 or <loss>=1 (Megatron-Core's rule)")
        if count % layout.vp:
            yield RuleViolation(name, count, f"a multiple of <vp> ({layout.vp})")
    left = arch.num_layers - sum(fixed.values()) + layout.embedding + layout.loss
    stages = layout.pp - len(fixed)
    what = f"{left} layers" if fixed or layout.embedding or layout.loss else f"num_layers ({left})"
    if (stages and (left < 0 or left % stages)) or (not stages and left):
        good = divisors(left) if left > 0 and stages else []
        listed = _listed(size + len(fixed) for size in good)
        more = f", and {len(fixed)} more" if fixed else ""
        expected = f"a divisor of {what}{more}: {listed}" if good else f"a number of stages that divides {what}"
        yield RuleViolation("pp", layout.pp, expected)
    if stages:
        yield from _divides("vp", layout.vp, left // stages, "the layers of a pipeline stage")


def _rank_rules(layout: Layout) -> Iterator[RuleViolation]:
    for names in (("tp", "cp", "pp"), ("etp", "ep", "pp")):
        if layout.gpus % (product := math.prod(getattr(layout, name) for name in names)):
            cut = [name for name in names if getattr(layout, name) > 1]
            named = cut[0] if len(cut) == 1 else " x ".join(names)
            yield RuleViolation(named, product, f"a divisor of the GPUs ({layout.gpus})")


def _data_rules(layout: Layout, work: Workload) -> Iterator[RuleViolation]:
    multiple = (2 * layout.cp if layout.cp > 1 else 1) * layout.tp
    if work.seq_length % multiple:
        text = f"tp{' x 2 x cp' if layout.cp > 1 else ''} ({multiple})"
        yield RuleViolation("seq_length", work.seq_length, f"a multiple of {text}")
    if work.lora and layout.ep > 1:
        yield RuleViolation("ep", layout.ep, "1 with LoRA, because NeMo averages the experts' adapters over all ranks")
    step, batch = layout.dp * layout.micro_batch, work.global_batch
    if batch % step:
        text = f"dp x micro-batch ({layout.dp} x {layout.micro_batch})"
        yield RuleViolation("global_batch", batch, f"a multiple of {text}")
    if layout.vp > 1 and layout.micro_batches(batch) % layout.pp:
        text = f"dp x micro-batch x pp ({step} x {layout.pp}), which interleaved stages (<vp> above 1) need"
        yield RuleViolation("global_batch", batch, f"a multiple of {text}")


def _kernel_rules(layout: Layout, arch: Architecture, work: Workload) -> Iterator[RuleViolation]:
    if arch.num_experts and work.dispatcher != "alltoall" and layout.etp * layout.ep == 1:
        text = "<etp> x <ep> above 1, as Megatron-Core's flex dispatcher needs"
        yield RuleViolation("ep", 1, text)
    if not work.numbers.fp8:
        return
    rows, needed = work.seq_length // layout.cp * layout.micro_batch, f"as {work.precision} needs"
    if rows % (multiple := _row_multiple(layout, work)):
        expected = f"a multiple of {multiple} tokens in each rank's part of a micro-batch (now {rows}), {needed}"
        yield RuleViolation("seq_length", work.seq_length, expected)
    heads = arch.num_heads * arch.head_dim, (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    dense = arch.ffn_size if arch.moe_layer_count < len(arch.layers_with("-")) else 0
    sizes = (
        ("precision", work.precision, 1, (arch.hidden_size,)),
        ("tp", layout.tp, layout.tp, (*heads, dense, arch.shared_ffn_size or 0)),
        ("etp", layout.etp, layout.etp, (arch.expert_ffn_size or 0,)),
    )
    for name, got, parts, widths in sizes:
        if wrong := [width // parts for width in widths if width // parts % work.numbers.rows]:
            expected = (
                f"matrices whose rows and columns are multiples of {work.numbers.rows} (now {wrong[0]}), {needed}"
            )
            yield RuleViolation(name, got, expected)


def _row_multiple(layout: Layout, work: Workload) -> int:
    """Return the number that must divide the number of tokens in a rank's micro-batch.

    Source: Transformer Engine at d0067d0d. A weight's gradient sums over the tokens, which needs a multiple of 16
    (MXFP8: 32; `cublaslt_gemm.cu`). Each rank's part under sequence parallelism needs a multiple of 8
    (`assert_dim_for_fp8_exec`).
    """
    return math.lcm(work.numbers.rows, 8 * layout.tp) if work.numbers.fp8 else 1


def _divides(name: str, value: int, number: int, what: str) -> Iterator[RuleViolation]:
    if number % value:
        yield RuleViolation(name, value, f"a divisor of {what} ({number}): {_listed(divisors(number))}")


def _listed(numbers: Iterable[int]) -> str:
    shown = [str(number) for number in numbers]
    return ", ".join(shown[:12]) + (" ..." if len(shown) > 12 else "")


def _fix(name: str, layout: Layout, arch: Architecture, work: Workload, software: str) -> str:
    """Return the nearest change of one setting that makes the layout valid.

    The settings that the rule names are tried first, then the layout's sizes that differ from the default, then all
    other settings.
    """
    chosen = [field.name for field in fields(layout) if getattr(layout, field.name) != field.default]
    chosen = [key for key in chosen if key != "gpus"]
    order = dict.fromkeys([*name.split(" x "), *chosen, "global_batch", "seq_length", *_SIZES, "gpus"])
    for key in order:
        for text, rule in _changes(key, layout, arch, work, software):
            if rule is None:
                return text
    for key in name.split(" x "):  # no single change is enough, so find a change that satisfies at least this rule
        for text, rule in _changes(key, layout, arch, work, software):
            if rule is None or rule.name != name:
                return text
    return "change several sizes: `nemo-upcycle plan` without --layout finds good ones"


def _changes(
    key: str, layout: Layout, arch: Architecture, work: Workload, software: str
) -> Iterator[tuple[str, RuleViolation | None]]:
    """Yield changes of a setting, the nearest first, each with the rule that the changed layout breaks (or None)."""
    for value in _candidates(key, layout, arch, work):
        text = f"omit <{key}>" if value is None else f"set <{key}>={value}"
        text = f"train in {value}" if key == "precision" else text
        changed = with_size(layout, work, key, value)
        yield text, first_violation(changed[0], arch, changed[1], software)


def _candidates(key: str, layout: Layout, arch: Architecture, work: Workload) -> Sequence[int | str | None]:
    """Return values to try for a setting, the nearest first."""
    now = getattr(layout if hasattr(layout, key) else work, key)
    values: set[int | None]
    if key in _SWITCHES:
        return [0, 1]
    if key == "precision":
        return ["bf16"]
    if key in ("first", "last"):
        values = {None, *range(1, arch.num_layers)}
    elif key in _SIZES:
        values = {*range(1, 129), *(size for size in divisors(arch.num_layers) if size > 128)}
    else:
        steps = [max(1, step) for step in _multiples_of(key, layout, work)]
        values = {step * count for step in steps for count in (now // step, now // step + 1) if count}
    return sorted(
        values - {now}, key=lambda value: (math.inf, 0) if value is None else (abs(value - (now or 0)), value)
    )


def _multiples_of(key: str, layout: Layout, work: Workload) -> tuple[int, ...]:
    if key == "gpus":
        return (math.lcm(layout.tp * layout.cp * layout.pp, layout.etp * layout.ep * layout.pp),)
    if key == "seq_length":
        of = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
        return of, math.lcm(of, _row_multiple(layout, work) * layout.cp)
    step = max(1, layout.gpus // max(1, layout.tp * layout.cp * layout.pp)) * layout.micro_batch
    return step, step * layout.pp


def with_size(layout: Layout, work: Workload, key: str, value: int | str | None) -> tuple[Layout, Workload]:
    """Return the layout and the step with one setting changed; the name decides which of the two has the setting."""
    sizes: dict[str, Any] = {key: value}
    if not hasattr(layout, key):
        return layout, replace(work, **sizes)
    if key == "tp" and layout.ep == 1 and layout.etp == layout.tp:
        sizes["etp"] = value  # nobody chose etp: `parse_layout` set it to tp
    return replace(layout, **sizes), work
