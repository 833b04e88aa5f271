"""Check that a recipe's parallel layout fits model, ranks and data, before anything is launched or built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.planning import rules
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.workload import Workload


#: The planner's name of a size -> where a recipe of NeMo's sets it, and one of Bridge's.
NEMO_SETTINGS = {
    "tp": "trainer.strategy.tensor_model_parallel_size",
    "pp": "trainer.strategy.pipeline_model_parallel_size",
    "vp": "trainer.strategy.virtual_pipeline_model_parallel_size",
    "cp": "trainer.strategy.context_parallel_size",
    "ep": "trainer.strategy.expert_model_parallel_size",
    "etp": "trainer.strategy.expert_tensor_parallel_size",
    "tp x cp x pp": "of trainer.strategy, and the GPUs are trainer.num_nodes x trainer.devices",
    "etp x ep x pp": "of trainer.strategy, and the GPUs are trainer.num_nodes x trainer.devices",
    "seq-length": "data.seq_length",
    "global-batch": "data.global_batch_size",
    "top_k": "model.config.moe_router_topk",
    "sequence_parallel": "trainer.strategy.sequence_parallel",
}
BRIDGE_SETTINGS = {
    "tp": "model.tensor_model_parallel_size",
    "pp": "model.pipeline_model_parallel_size",
    "vp": "model.virtual_pipeline_model_parallel_size",
    "cp": "model.context_parallel_size",
    "ep": "model.expert_model_parallel_size",
    "etp": "model.expert_tensor_parallel_size",
    "tp x cp x pp": "of model, and the GPUs are gpus",
    "etp x ep x pp": "of model, and the GPUs are gpus",
    "seq-length": "dataset.seq_length",
    "global-batch": "train.global_batch_size",
    "top_k": "model.moe_router_topk",
    "sequence_parallel": "model.sequence_parallel",
}


def layout_of(strategy: Any, ranks: int, micro_batch: int = 1) -> Layout:
    """Return the planner's layout of a Megatron strategy, built or as its NeMo-Run configuration."""

    def size(name: str, otherwise: Any = 1) -> Any:
        value = getattr(strategy, name, None)
        return otherwise if value is None else value

    tensor = size("tensor_model_parallel_size")
    return Layout(
        gpus=ranks,
        tp=tensor,
        pp=size("pipeline_model_parallel_size"),
        vp=size("virtual_pipeline_model_parallel_size"),
        cp=size("context_parallel_size"),
        ep=size("expert_model_parallel_size"),
        etp=size("expert_tensor_parallel_size", tensor),
        micro_batch=micro_batch,
        first=size("num_layers_in_first_pipeline_stage", None),
        last=size("num_layers_in_last_pipeline_stage", None),
        embedding=int(size("account_for_embedding_in_pipeline_split", 0)),
        loss=int(size("account_for_loss_in_pipeline_split", 0)),
    )


def check_layout(
    strategy: Any, config: Any, data: Any, ranks: int, settings: Mapping[str, str] = NEMO_SETTINGS
) -> None:
    """Check the parallel sizes of a Megatron strategy against the model's config, the ranks and the data.

    Works on built objects and on their NeMo-Run configurations alike.

    Args:
        strategy: has `tensor_model_parallel_size` and its siblings.
        config: the model's, has `num_layers`, `num_attention_heads`, ...
        data: has `seq_length`, `global_batch_size`, `micro_batch_size`; what it does not have is not checked.
        ranks: nodes times devices.
        settings: where the recipe sets each size, for the text of an error.

    Raises:
        SpecError: a rule is broken; the text names the nearest good value and the setting.
    """
    arch = architecture_of(config, vocab_size=1)  # no rule asks for the vocabulary
    layout = layout_of(strategy, ranks, getattr(data, "micro_batch_size", 1))
    try:
        if arch.num_experts and not 1 <= (arch.top_k or 0) <= arch.num_experts:
            raise SpecError(
                "top_k", got=arch.top_k, expected=f"1 to num_moe_experts ({arch.num_experts})", fix="lower it"
            )
        rules.check_layout(layout, arch, _work(config, data, layout))
        if arch.num_experts and layout.tp > 1 and not getattr(strategy, "sequence_parallel", False):
            raise SpecError(
                "sequence_parallel",
                got=False,
                expected=f"True with tp={layout.tp}: Megatron-Core trains experts in no other way",
                fix="set it, or tp=1",
            )
    except SpecError as error:
        name = str(error).partition(":")[0]
        where = f" ({name} is {settings[name]})" if name in settings else ""
        raise SpecError(f"{error}{where}") from None


def _work(config: Any, data: Any, layout: Layout) -> Workload:
    """Build the Workload, with neutral values for settings the data lacks."""
    work = rules.neutral_work(layout)
    return Workload(
        seq_length=getattr(data, "seq_length", None) or work.seq_length,
        global_batch=getattr(data, "global_batch_size", None) or work.global_batch,
        dispatcher="deepep" if getattr(config, "moe_enable_deepep", False) else "alltoall",
    )
