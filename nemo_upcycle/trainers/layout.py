"""Check that a recipe's parallel layout fits model, ranks and data, before anything is launched or built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.planning import rules
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.workload import PRECISIONS, Workload


#: The planner's name of a size -> that of Megatron's setting.
_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
    "embedding": "account_for_embedding_in_pipeline_split",
    "loss": "account_for_loss_in_pipeline_split",
}
#: What else a rule names of a strategy.
_STRATEGY = _SIZES | {
    "tp x cp x pp": "tensor_model_parallel_size x context_parallel_size x pipeline_model_parallel_size",
    "etp x ep x pp": "expert_tensor_parallel_size x expert_model_parallel_size x pipeline_model_parallel_size",
    "sequence_parallel": "sequence_parallel",
}
#: All that a rule names -> where a recipe of NeMo's sets it, and one of Bridge's.
NEMO_SETTINGS = {name: f"trainer.strategy.{setting}" for name, setting in _STRATEGY.items()} | {
    "gpus": "trainer.num_nodes x devices",
    "seq_length": "data.seq_length",
    "micro_batch": "data.micro_batch_size",
    "global_batch": "data.global_batch_size",
    "top_k": "model.config.moe_router_topk",
    "router_padding": "model.config.moe_router_padding_for_fp8",
    "precision": "trainer.plugins.fp8_recipe",
}
BRIDGE_SETTINGS = {name: f"model.{setting}" for name, setting in _STRATEGY.items()} | {
    "seq_length": "dataset.seq_length",
    "micro_batch": "train.micro_batch_size",
    "global_batch": "train.global_batch_size",
    "top_k": "model.moe_router_topk",
    "router_padding": "model.moe_router_padding_for_quantization",
    "precision": "mixed_precision",
}
_PADDINGS = ("moe_router_padding_for_fp8", "moe_router_padding_for_quantization")


def layout_of(strategy: Any, ranks: int, micro_batch: int = 1) -> Layout:
    """Return the planner's layout of a Megatron strategy, built or as its NeMo-Run configuration."""
    found = {name: getattr(strategy, setting, None) for name, setting in _SIZES.items()}
    sizes = {name: int(value) for name, value in found.items() if value is not None}
    return Layout(gpus=ranks, micro_batch=micro_batch, **{"etp": sizes.get("tp", 1)} | sizes)


def usual_communication(layout: Layout) -> dict[str, bool]:
    """Return which communication runs beside computation where a trainer chooses by the layout."""
    return {"gradients": layout.dp > 1, "weights": layout.dp > 1, "stages": layout.vp > 1}


def check_layout(
    strategy: Any,
    config: Any,
    data: Any,
    ranks: int,
    settings: Mapping[str, str] = NEMO_SETTINGS,
    precision: str = "bf16",
) -> None:
    """Check the parallel sizes of a Megatron strategy against the model's config, the ranks, the data, the precision.

    Works on built objects and on their NeMo-Run configurations alike.

    Args:
        strategy: has `tensor_model_parallel_size` and its siblings.
        config: the model's, has `num_layers`, `num_attention_heads`, ...
        data: has `seq_length`, `global_batch_size`, `micro_batch_size`; what it does not have is not checked.
        ranks: nodes times devices.
        settings: where the recipe sets each size, for errors.
        precision: the planner's name; of one that it does not know nothing is checked.

    Raises:
        SpecError: a rule is broken; it names the setting and the nearest good value.
    """
    arch = architecture_of(config, vocab_size=1)  # no rule asks for the vocabulary
    layout = layout_of(strategy, ranks, getattr(data, "micro_batch_size", 1))
    try:
        if arch.num_experts and not 1 <= (arch.top_k or 0) <= arch.num_experts:
            expected = f"1 to num_moe_experts ({arch.num_experts})"
            raise SpecError(field="top_k", got=arch.top_k, expected=expected, fix="set <top_k>=2")
        rules.check_layout(layout, arch, _work(config, data, layout, precision))
        if arch.num_experts and layout.tp > 1 and not getattr(strategy, "sequence_parallel", False):
            raise SpecError(
                field="sequence_parallel",
                got=False,
                expected=f"True with <tp>={layout.tp}: Megatron-Core trains experts in no other way",
                fix="set <sequence_parallel>=True, or <tp>=1",
            )
        pads = any(getattr(config, name, False) for name in _PADDINGS)
        if pads and getattr(config, "moe_pad_expert_input_to_capacity", False):
            raise SpecError(
                field="router_padding",
                got=True,
                expected="False where experts are padded to their capacity: those tokens are not the router's to pad",
                fix="set <router_padding>=False",
            )
    except SpecError as error:
        raise error.renamed(lambda name: settings.get(name, name)) from None


def _work(config: Any, data: Any, layout: Layout, precision: str) -> Workload:
    """Build the Workload, with neutral values for settings the data lacks."""
    work = rules.neutral_work(layout)
    return Workload(
        seq_length=getattr(data, "seq_length", None) or work.seq_length,
        global_batch=getattr(data, "global_batch_size", None) or work.global_batch,
        dispatcher="deepep" if getattr(config, "moe_enable_deepep", False) else "alltoall",
        precision=precision if precision in PRECISIONS else "bf16",
    )
