"""Settings with which routers balance the expert load: a loss, or biases.

Biases start at zero, so step 0 still computes the parent's function. `trainers/aux_loss.py` makes sure that a loss
has the effect of its coefficient in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_upcycle.errors import SpecError


#: Type of balancing in Megatron-Core 0.19. Once a step, each expert's bias is set to a quantile of the expert's
#: logits. The quantile is chosen so that all experts get the same number of tokens.
QUANTILES = "quantile_balancing"
#: Default balancing. NeMo's Mixtral has this loss, and He et al. (arXiv 2410.07524) found the same coefficient best.
BALANCING_LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
_EMA = "moe_router_quantile_balancing_ema"
_BIASES = "moe_router_enable_expert_bias"
_KIND = "moe_router_load_balancing_type"


def balancing_bias(config: Any) -> dict[str, float]:
    """Return the Megatron settings that move the biases of a model's routers; empty without biases.

    Args:
        config: configuration of the model.

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
    """Return Megatron's settings for routers that keep their biases; the inverse of `balancing_bias`.

    Args:
        moved_by: settings that move the biases; empty without biases.
    """
    if not moved_by:
        return {}
    kind = {_KIND: QUANTILES, "moe_aux_loss_coeff": 0.0} if _EMA in moved_by else {_KIND: "none", _BIASES: True}
    return kind | dict(moved_by)


def check_balancing(config: Any, router_score: str) -> None:
    """Check that the router biases of a configuration can balance the experts.

    Args:
        config: configuration of Megatron, NeMo or Bridge, built or as a `run.Config`.
        router_score: router score of the spec.

    Raises:
        SpecError: this Megatron-Core lacks such biases, or another setting conflicts with them.
    """
    for name, in_the_way, expected, fix in (*_of_signs(config, router_score), *_of_quantiles(config)):
        if in_the_way:
            got = getattr(config, name)
            raise SpecError(field=f"model.config.{name}", got=got, expected=expected, fix=fix)


def _of_signs(config: Any, router_score: str) -> Iterator[tuple[str, bool, str, str]]:
    """Yield the settings to check for biases with an update rate: name, whether it conflicts, expected value, fix."""
    if getattr(config, _BIASES, False):
        expected = "false with router_score=softmax, because Megatron adds the biases to sigmoid scores"
        fix = "set the spec's router_score to sigmoid, or use a load-balancing loss"
        yield _BIASES, router_score == "softmax", expected, fix
        name = "moe_pad_expert_input_to_capacity"
        expected = f"false with {_BIASES}, because padding makes all expert loads equal, and the biases never change"
        yield name, bool(getattr(config, name, False)), expected, f"set it to false, or {_BIASES}"


def _of_quantiles(config: Any) -> Iterator[tuple[str, bool, str, str]]:
    """Yield the settings to check for quantile biases, with the same entries as `_of_signs`."""
    if QUANTILES not in (kinds := _kinds(config)):
        return
    expected = "a kind that this Megatron-Core has (quantiles need 0.19)"
    fix = f"train in Megatron-Bridge, or set it to aux_loss, or to none with {_BIASES}"
    yield _KIND, not hasattr(config, _EMA), expected, fix
    yield (
        _KIND,
        len(kinds) > 1,
        f"only {QUANTILES}, because it cannot be combined with a loss",
        f"set it to {QUANTILES}",
    )
    for name, expected in (
        ("moe_aux_loss_coeff", f"0 with {QUANTILES}, which has no loss"),
        (_BIASES, f"false with {QUANTILES}, which has biases of its own"),
        ("moe_router_fusion", f"false with {QUANTILES}, which the fused router does not support"),
    ):
        yield name, bool(getattr(config, name, None)), expected, "set it to the expected value"


def _kinds(config: Any) -> list[str]:
    kinds = getattr(config, _KIND, None) or []
    return [kinds] if isinstance(kinds, str) else list(kinds)
