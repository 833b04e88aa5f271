"""How routers balance the experts: a loss, or biases, which begin at zero, so that step 0 is the parent's.

`trainers/aux_loss.py` sees to the coefficients of losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_upcycle.errors import SpecError


#: Megatron-Core 0.19's balancing: once a step, each expert's bias becomes the quantile of its logits that gives it as
#: many tokens as every other.
QUANTILES = "quantile_balancing"
#: How routers learn to balance, unless a user says otherwise: NeMo's Mixtral has this loss, and He et al. (arXiv
#: 2410.07524) found its coefficient best as well.
BALANCING_LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
_EMA = "moe_router_quantile_balancing_ema"
_BIASES = "moe_router_enable_expert_bias"
_KIND = "moe_router_load_balancing_type"


def balancing_bias(config: Any) -> dict[str, float]:
    """Name, as Megatron does, what moves the biases of a model's routers; empty where they have none.

    Args:
        config: the model's.

    Example:
        >>> balancing_bias(chunk.config)  # doctest: +SKIP
        {'moe_router_bias_update_rate': 0.001}
    """
    if not config.num_moe_experts:
        return {}
    names = ["moe_router_bias_update_rate"] if getattr(config, _BIASES) else []
    names += [_EMA] if QUANTILES in _kinds(config) else []
    return {name: getattr(config, name) for name in names}


def bias_fields(moved_by: Mapping[str, float]) -> dict[str, Any]:
    """Return the settings of a model whose routers keep their biases, the inverse of `balancing_bias`.

    Args:
        moved_by: what moves them; empty where there are none.
    """
    if not moved_by:
        return {}
    kind = {_KIND: QUANTILES, "moe_aux_loss_coeff": 0.0} if _EMA in moved_by else {_KIND: "none", _BIASES: True}
    return kind | dict(moved_by)


def check_balancing(config: Any, router_score: str) -> None:
    """Check that biases which shall balance the experts can do so.

    Args:
        config: Megatron's, NeMo's or Bridge's, built or as a `run.Config`.
        router_score: the spec's.

    Raises:
        SpecError: this Megatron-Core has none such, or another setting is in the way.
    """
    for name, in_the_way, expected, fix in (*_of_signs(config, router_score), *_of_quantiles(config)):
        if in_the_way:
            got = getattr(config, name)
            raise SpecError(field=f"model.config.{name}", got=got, expected=expected, fix=fix)


def _of_signs(config: Any, router_score: str) -> Iterator[tuple[str, bool, str, str]]:
    """Yield what biases that move by a rate exclude: setting, whether it is in the way, what it must be, fix."""
    if getattr(config, _BIASES, False):
        expected = "false with router_score=softmax, because Megatron adds the biases to sigmoid scores"
        fix = "set the spec's router_score to sigmoid, or use a load-balancing loss"
        yield _BIASES, router_score == "softmax", expected, fix
        name = "moe_pad_expert_input_to_capacity"
        expected = f"false with {_BIASES}, because padding makes all expert loads equal, and no bias moves"
        yield name, bool(getattr(config, name, False)), expected, f"set it to false, or {_BIASES}"


def _of_quantiles(config: Any) -> Iterator[tuple[str, bool, str, str]]:
    """Yield the same for biases by quantiles."""
    if QUANTILES not in (kinds := _kinds(config)):
        return
    expected = "a kind that this Megatron-Core has (quantiles need 0.19)"
    fix = f"train in Megatron-Bridge, or set it to aux_loss, or to none with {_BIASES}"
    yield _KIND, not hasattr(config, _EMA), expected, fix
    yield (
        _KIND,
        len(kinds) > 1,
        f"{QUANTILES} alone, because it cannot be combined with a loss",
        f"set it to {QUANTILES}",
    )
    for name, expected in (
        ("moe_aux_loss_coeff", f"0 with {QUANTILES}, which has no loss"),
        (_BIASES, f"false with {QUANTILES}, which has biases of its own"),
        ("moe_router_fusion", f"false with {QUANTILES}, which the fused router does not support"),
    ):
        yield name, bool(getattr(config, name, None)), expected, "set it to that"


def _kinds(config: Any) -> list[str]:
    kinds = getattr(config, _KIND, None) or []
    return [kinds] if isinstance(kinds, str) else list(kinds)
