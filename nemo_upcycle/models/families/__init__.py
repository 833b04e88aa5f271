"""Model families: one file per Hugging Face class, and one line here that registers it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.architecture import FAMILIES, Architecture
from nemo_upcycle.models.families.base import Family, MoeFamily
from nemo_upcycle.spec import ROUTER_KINDS, UpcycleSpec


#: Modules of this package, each with its `FAMILY`. If several targets can hold a model, the first of these targets is
#: used.
_MODULES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "olmo2",
    "olmo3",
    "phi3",
    "smollm3",
    "exaone3",
    "exaone4",
    "granite",
    "granite4",
    "granite_swa",
    "gemma3",
    "gemma4",
    "ministral3",
    "internlm3",
    "iquest_coder",
    "seed_oss",
    "cwm",
    "hyperclovax",
    "arcee",
    "mimo",
    "nemotron_h",
    "qwen3_5",
    "mixtral",
    "qwen3_moe",
    "qwen3_vl_moe",
    "glm4_moe",
    "qwen2_moe",
    "flex_olmo",
    "olmoe",
    "granite_moe",
    "granite_moe_shared",
    "granite_moe_swa",
    "qwen3_5_moe",
    "gemma4_moe",
)
_FAMILIES: dict[str, Family] = FAMILIES


def register(family: Family) -> None:
    """Register a family of this package or of another package.

    Args:
        family: a parent (`Family`) or a target (`MoeFamily`). It replaces a family of the same Hugging Face class.

    Example:
        >>> register(replace(llama.FAMILY, title="Mine", hf_class="MineForCausalLM"))  # doctest: +SKIP
    """
    _FAMILIES[family.hf_class] = family


for _module in _MODULES:
    register(import_module(f"{__name__}.{_module}").FAMILY)


def find_family(hf_class: str, model_type: str = "") -> Family | None:
    """Return the family of a Hugging Face class; None for an unknown class.

    Args:
        hf_class: Hugging Face class; "" to find the family by `model_type`.
        model_type: `model_type` in `config.json`, see `Family.computed_as`.
    """
    if not hf_class:
        return next((one for one in (*parents(), *_FAMILIES.values()) if one.model_type == model_type), None)
    kinds = {(one.computed_as, one.model_type): one for one in _FAMILIES.values() if one.computed_as}
    return kinds.get((hf_class, model_type)) or _FAMILIES.get(hf_class)


def find_nemo_module(name: str, *, has_experts: bool = False) -> Family | None:
    """Return the family whose configuration is in a NeMo module; None if there is none.

    Args:
        name: name of the module.
        has_experts: whether to return only a family of MoE models.
    """
    found = [family for family in _FAMILIES.values() if name and family.nemo_module == name]
    return next((family for family in found if isinstance(family, MoeFamily) or not has_experts), None)


def find_dense(arch: Architecture, nemo_module: str) -> Family | None:
    """Return the family of a dense model's NeMo module, or else the first family that computes the same function."""
    own, known = find_nemo_module(nemo_module), parents()
    return next((family for family in (own, *known) if family in known and family.computes(arch)), None)


def parents() -> list[Family]:
    """Return the families of dense models that can be upcycled."""
    return [family for family in _FAMILIES.values() if not isinstance(family, MoeFamily)]


def targets() -> list[MoeFamily]:
    """Return the MoE families whose Hugging Face class can be used without another class around it."""
    return [family for family in _FAMILIES.values() if isinstance(family, MoeFamily) and not family.only_among_others]


def check_parent(arch: Architecture, where: str) -> None:
    """Check that a dense model can get experts, or that an MoE model can get more experts.

    Args:
        arch: architecture of the model.
        where: name of the model in messages.

    Raises:
        CheckpointError: the model has experts and cannot get more.
    """
    family = _FAMILIES.get(arch.hf_class)
    reason = family.no_parent_because if isinstance(family, MoeFamily) else ""
    if arch.router_score == "sigmoid" and not arch.norm_topk:
        reason = "whose expert weights do not sum to one (norm_topk_prob), as Megatron's do"
    if arch.num_experts and reason:
        growing = [one.hf_class for one in targets() if not one.no_parent_because]
        raise CheckpointError(
            where,
            kind="refused",
            got=f"cannot be a parent: it is a {arch.hf_class}, {reason}",
            fix=f"give its dense parent, or a model of class {', '.join(growing)}",
        )


def why_not_exported(arch: Architecture) -> str:
    """Return the reason why no Hugging Face class can hold a model; "" if a class can hold the model.

    Args:
        arch: architecture of the model.
    """
    try:
        require_class(arch)
    except SpecError as error:
        return f"the model cannot be exported to Hugging Face: it {error.got}"
    return ""


def require_class(moe_arch: Architecture) -> None:
    """Check that a Hugging Face class can hold a model.

    Raises:
        SpecError: no class can hold the model; the message says why.
    """
    if moe_arch.hf_class:
        return
    titles: dict[str, list[str]] = {}
    # Gemma 4's MoE class holds only Gemma 4, and no other class holds Gemma 4
    near = [family for family in targets() if bool(family.saved_as) is moe_arch.keeps_network]
    for family in near:
        titles.setdefault(next(family.unsupported(moe_arch)), []).append(family.title)
    only_bridge = moe_arch.mamba or moe_arch.quantile_bias or moe_arch.output_gate
    where = "Megatron-Bridge" if only_bridge else "NeMo, which can train and evaluate it"
    advice = [] if moe_arch.keeps_network else [f"keep the model in {where}"]
    advice += _changes_that_help(moe_arch, near)
    reasons = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in titles.items())
    raise SpecError(
        "This MoE",
        kind="refused",
        got=f"fits no Hugging Face class: {reasons}",
        fix=", or ".join(advice) or "use another parent",
    )


#: Fields of an `Architecture`, with the values that make every layer attend to all tokens.
_OPENED: dict[str, Any] = {"sliding_window": None, "window_pattern": None, "local_rope_theta": None}
_OPEN = (
    "if no training sequence was longer than the window, set sliding_window in config.json to null, and each of its"
    " layer_types to full_attention"
)


def _changes_that_help(moe_arch: Architecture, near: list[MoeFamily]) -> list[str]:
    """List the smallest changes of the spec or of the parent's window with which a class can hold the model.

    Args:
        moe_arch: architecture of the model.
        near: families of the classes to try.
    """
    network = moe_arch.ffn_size if moe_arch.keeps_network else 0
    layers, shared, window = (
        [({}, {}), ({"moe_pattern": None}, {"moe_layers": "all"})] if moe_arch.moe_pattern else [({}, {})],
        [({}, {}), ({"shared_ffn_size": network}, {"shared_experts": 0})]
        if moe_arch.shared_ffn_size > network
        else [({}, {})],
        [({}, {}), (_OPENED, {_OPEN: None})] if moe_arch.window else [({}, {})],
    )
    found: dict[str, int] = {}
    for parts in itertools.product(_routes(moe_arch), layers, shared, window):
        fields, changes = ({key: value for part in parts for key, value in part[at].items()} for at in (0, 1))
        changed = replace(moe_arch, **fields)
        if any(not any(family.unsupported(changed)) for family in near):
            sets = [f"<{name}>={value}" for name, value in changes.items() if name != _OPEN]
            text = [f"set {' and '.join(sets)}"] if sets else []
            found[" and ".join([*text, *([_OPEN] if _OPEN in changes else [])])] = len(changes)
    return [text for text, size in found.items() if size == min(found.values())]


def _routes(moe_arch: Architecture) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield `Architecture` fields and spec fields for each kind of router, beginning with the model's kind."""
    own, experts, top_k = moe_arch.router_kind, moe_arch.num_experts or 0, moe_arch.top_k or 1
    yield {}, {}
    for kind, chosen in itertools.product(ROUTER_KINDS.values(), dict.fromkeys((top_k, max(top_k, 2)))):
        route = {"router_score": kind.score, "router_order": kind.order, "top_k": chosen}
        try:
            spec = UpcycleSpec(num_experts=experts, **route)
        except SpecError:  # some kinds of router refuse top_k=1
            continue
        fields = {"router_score": kind.score, "norm_topk": spec.sums_to_one, "top_k": chosen}
        was = {"router_score": own.score, "router_order": own.order, "top_k": top_k}
        yield fields, {name: value for name, value in route.items() if value != was[name]}
