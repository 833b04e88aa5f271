"""Check that a recipe's parallel layout fits model, ranks and data, before anything is launched or built."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.planning import rules
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.workload import PRECISIONS, Workload
from nemo_upcycle.trainers.backends import BACKENDS
from nemo_upcycle.trainers.settings import sizes_of


#: The planner's name of a size -> Megatron's setting name.
_SIZES = {
    size: name.rpartition(".")[2]
    for size, name in sizes_of("bridge").items()
    if size in (*("tp", "pp", "vp", "cp", "ep", "etp"), *("first", "last", "embedding", "loss"))
}
_PADDINGS = ("moe_router_padding_for_fp8", "moe_router_padding_for_quantization")


def layout_of(strategy: Any, ranks: int, micro_batch: int = 1) -> Layout:
    """Return the planner's layout of a Megatron strategy, which may be an object or its NeMo-Run configuration."""
    found = {name: getattr(strategy, setting, None) for name, setting in _SIZES.items()}
    sizes = {name: int(value) for name, value in found.items() if value is not None}
    return Layout(gpus=ranks, micro_batch=micro_batch, **{"etp": sizes.get("tp", 1)} | sizes)


def check_layout(
    strategy: Any,
    config: Any,
    data: Any,
    ranks: int,
    trainer: str = "nemo",
    precision: str = "bf16",
) -> None:
    """Check a Megatron strategy's parallel sizes against the model's config, the ranks, the data and the precision.

    Accepts built objects and their NeMo-Run configurations.

    Args:
        strategy: object with `tensor_model_parallel_size` and its siblings.
        config: model configuration with `num_layers`, `num_attention_heads`, ...
        data: object with `seq_length`, `global_batch_size`, `micro_batch_size`; missing attributes are not checked.
        ranks: nodes times devices.
        trainer: trainer whose setting names appear in errors.
        precision: the planner's name of the precision; an unknown name is not checked.

    Raises:
        SpecError: a rule is broken; the text names the setting and the nearest valid value.
    """
    arch = architecture_of(config, vocab_size=1)  # no rule asks for the vocabulary
    layout = layout_of(strategy, ranks, getattr(data, "micro_batch_size", 1))
    try:
        if arch.num_experts and not 1 <= (arch.top_k or 0) <= arch.num_experts:
            expected = f"1 to num_moe_experts ({arch.num_experts})"
            raise SpecError(field="top_k", got=arch.top_k, expected=expected, fix="set <top_k>=2")
        software = BACKENDS[trainer].software
        rules.check_layout(layout, arch, _work(config, data, layout, precision), software)
        if arch.num_experts and layout.tp > 1 and not getattr(strategy, "sequence_parallel", False):
            raise SpecError(
                field="sequence_parallel",
                got=False,
                expected=f"True with <tp>={layout.tp}, because Megatron-Core cannot train experts without it",
                fix="set <sequence_parallel>=True, or <tp>=1",
            )
        pads = any(getattr(config, name, False) for name in _PADDINGS)
        if pads and getattr(config, "moe_pad_expert_input_to_capacity", False):
            raise SpecError(
                field="router_padding",
                got=True,
                expected="False if experts are padded to their capacity",
                fix="set <router_padding>=False",
            )
    except SpecError as error:
        names = sizes_of(trainer)
        raise error.renamed(lambda name: names.get(name, name)) from None


def _work(config: Any, data: Any, layout: Layout, precision: str) -> Workload:
    """Build the Workload, with neutral values for the settings that the data lack."""
    work = rules.neutral_work(layout)
    return Workload(
        seq_length=getattr(data, "seq_length", None) or work.seq_length,
        global_batch=getattr(data, "global_batch_size", None) or work.global_batch,
        dispatcher="deepep" if getattr(config, "moe_enable_deepep", False) else "alltoall",
        precision=precision if precision in PRECISIONS else "bf16",
    )
