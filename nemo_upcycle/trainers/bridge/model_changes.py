"""Give a Bridge model another parent or spec, and keep all other settings."""

from __future__ import annotations

import copy
from dataclasses import MISSING, fields
from functools import partial
from typing import Any

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.training.models.base import ModelConfig

from nemo_upcycle.models.config_fields import table
from nemo_upcycle.models.hybrid import hybrid_pattern
from nemo_upcycle.trainers.bridge.hooks import pre_wrap_hooks
from nemo_upcycle.trainers.bridge.models import Origin, builder_of, made_of, provider_of, set_origin


#: Entries of `config_fields.yaml`. _STAYING: kinds of settings that change nothing in a filled model. _LAYOUT: code
#: that handles the layout settings.
_STAYING = (
    "who computes what, and when",
    "memory and recomputation",
    "loss, gradients and training",
    "types of products, with weights in their own",
    "kernels",
    "how tokens reach their experts, and what the router learns",
)
#: Fields that a change of the parent does not touch: sequence length, hooks, and the parts of a configuration.
_OWN = ("seq_length", "transformer", "pre_wrap_hooks", "post_wrap_hooks", "builder")
_LAYOUT = ("online.plan.split_name", "online.plan.RankCoords", "online.quantized.quantize")


def model_like(given: Any, origin: Origin, **changes: Any) -> Any:
    """Return the model of a parent and a spec, with the form, layout, precision and kernels of another model.

    Args:
        given: Bridge's provider or builder's configuration; it stays unchanged. None: a default provider.
        origin: parent and spec of the model.
        changes: fields that are to differ, which take precedence over the other model's fields.

    Raises:
        SpecError: Bridge's model class cannot represent the model.
    """
    if given is None:
        return provider_of(origin, **changes)
    kept = kept_settings(given, origin)
    if isinstance(given, HybridModelConfig | HybridModelProvider) and not origin.arch.mamba:
        borders = (given.hybrid_layer_pattern or "").count("|")
        moe = [origin.arch.is_moe_layer(layer) for layer in range(origin.arch.num_layers)]
        kept["hybrid_layer_pattern"] = hybrid_pattern(moe, segments=borders + 1)
    make = builder_of if isinstance(given, ModelConfig) else provider_of
    return make(origin, **(kept | changes))


def copied(model: Any) -> Any:
    """Return an independent copy of a model's settings, with the same hooks for Bridge to call."""
    model = copy.copy(model)
    if isinstance(model, ModelConfig):
        model.transformer, model.pre_wrap_hooks = copy.copy(model.transformer), copy.copy(model.pre_wrap_hooks)
    else:
        model._pre_wrap_hooks = pre_wrap_hooks(model)
    return model


def forget_experts(model: Any) -> None:
    """Reset the settings that only a model with experts needs, in place."""
    model = getattr(model, "transformer", model)
    for field in fields(model):
        if field.name.startswith(("moe_", "expert_")) and field.default is not MISSING:
            setattr(model, field.name, field.default)
    if modules := model.recompute_modules:
        kept = [name for name in modules if name not in ("moe", "moe_act", "shared_experts")]
        model.recompute_modules = kept or None


def follow(model: Any, now: Origin) -> None:
    """Let a model's settings follow a change of its parent or spec, in place; all other settings stay.

    Args:
        model: a model of this package.
        now: new parent and spec of the model.
    """
    before = made_of(model)
    if before is None or before == now:
        return
    old, new = (_plain(model, origin) for origin in (before, now))
    for part in ("", "transformer") if isinstance(model, ModelConfig) else ("",):
        owner, one, other = (getattr(each, part) if part else each for each in (model, old, new))
        for name in (field.name for field in fields(other) if field.name not in _OWN and field.name[0] != "_"):
            if not _same(getattr(one, name), value := getattr(other, name)):
                setattr(owner, name, value)
    set_origin(model, now)


def _plain(model: Any, origin: Origin) -> Any:
    """Return the model of a parent and a spec in another model's form, with defaults for all other settings."""
    changes = {}
    if (pattern := getattr(model, "hybrid_layer_pattern", None)) and not origin.arch.mamba:
        moe = iter([origin.arch.is_moe_layer(layer) for layer in range(origin.arch.num_layers)])
        symbols = ("-E"[next(moe, False)] if symbol in "-E" else symbol for symbol in pattern)
        changes["hybrid_layer_pattern"] = "".join(symbols)
    return (builder_of if isinstance(model, ModelConfig) else provider_of)(origin, **changes)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return bool(one == other)


def kept_settings(model: Any, origin: Origin) -> dict[str, Any]:
    """Return the settings that a model's configuration keeps with another parent: layout, precision, kernels.

    Kernel settings always stay. Other settings stay if they differ from Bridge's default. If the model is dense, its
    kernel settings for experts are treated like other settings.

    Args:
        model: Bridge's provider, or the configuration of one of Bridge's builders.
        origin: parent and spec of the model that gets these settings.
    """
    model, arch = getattr(model, "transformer", model), origin.arch
    kinds = table()["free"]
    names = {name for kind, fields in kinds.items() if kind in _STAYING for name in fields}
    names |= {name for place in _LAYOUT for name in table()["handled"][place]}
    usual = GPTModelProvider.__dataclass_fields__
    given = {name: getattr(model, name) for name in names if name in usual and hasattr(model, name)}
    always = {name for name in kinds["kernels"] if model.num_moe_experts or not name.startswith("moe_")}
    kept = {
        name: value
        for name, value in given.items()
        if not callable(value) and (name in always or value != usual[name].default)
    }
    kept |= {name: getattr(model, name) for name in ("fp16", "bf16", "params_dtype", "pipeline_dtype")}
    if not (arch.gated and arch.activation == "silu"):
        kept["bias_activation_fusion"] = False
    if not arch.num_experts:
        kept = {name: value for name, value in kept.items() if not name.startswith(("moe_", "expert_"))}
    elif arch.router_score != "sigmoid":  # Megatron's expert biases work only with sigmoid scores
        kept.pop("moe_router_enable_expert_bias", None)
    return kept
