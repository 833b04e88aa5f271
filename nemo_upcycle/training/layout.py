"""Does a parallel layout fit the model and the ranks? Asked before anything is launched or built."""

from __future__ import annotations

from typing import Any

from nemo_upcycle.errors import SpecError, problem


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _require_divides(what: str, setting: str, size: int, name: str, number: int) -> None:
    if size < 1 or number % size:
        raise SpecError(
            problem(
                what, got=size, expected=f"a divisor of {name} ({number}): {_divisors(number)}", fix=f"set {setting}"
            )
        )


def check_layout(strategy: Any, config: Any, ranks: int) -> None:
    """Check the parallel sizes of a Megatron strategy against the model's config and the number of ranks.

    Works on built objects and on their NeMo-Run configurations alike.

    Args:
        strategy: has `tensor_model_parallel_size` and its siblings.
        config: the model's, has `num_layers`, `num_attention_heads`, ...
        ranks: nodes times devices.

    Raises:
        SpecError: a size does not divide what it has to; the text names the valid ones and the setting.
    """

    def size(name: str) -> int:
        return getattr(strategy, name, None) or 1

    tensor, pipeline = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
    virtual, expert = size("virtual_pipeline_model_parallel_size"), size("expert_model_parallel_size")
    context = size("context_parallel_size")
    expert_tensor = getattr(strategy, "expert_tensor_parallel_size", None) or tensor
    where = "trainer.strategy."
    groups = getattr(config, "num_query_groups", None) or config.num_attention_heads
    _require_divides("tensor parallelism", f"{where}tensor_model_parallel_size", tensor, "the key-value heads", groups)
    if experts := getattr(config, "num_moe_experts", None):
        _require_divides(
            "expert parallelism", f"{where}expert_model_parallel_size", expert, "num_moe_experts", experts
        )
        top_k = getattr(config, "moe_router_topk", 2)
        if not 1 <= top_k <= experts:
            fix = "lower model.config.moe_router_topk"
            raise SpecError(problem("top_k", got=top_k, expected=f"1 to num_moe_experts ({experts})", fix=fix))
    elif expert > 1:
        fix = f"set {where}expert_model_parallel_size=1"
        raise SpecError(problem("expert parallelism", got=expert, expected="1 for a dense model", fix=fix))
    if experts and expert == 1 and expert_tensor != tensor:
        # Megatron-Core 0.15 marks experts for a reduction of their own only where they are spread over ranks.
        fix = f"set {where}expert_model_parallel_size above 1, or expert_tensor_parallel_size={tensor}"
        expected = f"{tensor}, as tensor parallelism, without expert parallelism: gradients would stay unsummed"
        raise SpecError(problem("expert-tensor parallelism", got=expert_tensor, expected=expected, fix=fix))
    setting = f"{where}pipeline_model_parallel_size or virtual_pipeline_model_parallel_size"
    _require_divides("pipeline stages", setting, pipeline * virtual, "num_layers", config.num_layers)
    for what, product in (
        ("tensor x pipeline x context parallelism", tensor * pipeline * context),
        ("expert-tensor x expert x pipeline parallelism", expert_tensor * expert * pipeline),
    ):
        if ranks % product:
            raise SpecError(
                problem(
                    "ranks (nodes x devices)",
                    got=ranks,
                    expected=f"a multiple of {product} ({what})",
                    fix="set trainer.num_nodes and trainer.devices, or lower a parallel size",
                )
            )
