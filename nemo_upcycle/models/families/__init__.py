"""The model families: one file a Hugging Face class, and one line here that registers it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.architecture import FAMILIES, Architecture
from nemo_upcycle.models.families.base import Family, MoeFamily
from nemo_upcycle.spec import find_router_kind


#: Modules of this package, each with its `FAMILY`. Of the targets that can hold a model, the first is taken.
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
    "gemma3",
    "gemma4",
    "ministral3",
    "internlm3",
    "iquest_coder",
    "seed_oss",
    "cwm",
    "hyperclovax",
    "arcee",
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
    """Let the package know a family: of an own file, or of another package.

    Args:
        family: a parent (`Family`) or a target (`MoeFamily`); it replaces one of the same Hugging Face class.

    Example:
        >>> register(replace(llama.FAMILY, title="Mine", hf_class="MineForCausalLM"))  # doctest: +SKIP
    """
    _FAMILIES[family.hf_class] = family


for _module in _MODULES:
    register(import_module(f"{__name__}.{_module}").FAMILY)


def find_family(hf_class: str, model_type: str = "") -> Family | None:
    """Return the family of a Hugging Face class; None for a class that is not known.

    Args:
        hf_class: the class; without one ("") the other says it.
        model_type: what `config.json` has beside it, see `Family.computed_as`.
    """
    if not hf_class:
        return next((one for one in (*parents(), *_FAMILIES.values()) if one.model_type == model_type), None)
    kinds = {(one.computed_as, one.model_type): one for one in _FAMILIES.values() if one.computed_as}
    return kinds.get((hf_class, model_type)) or _FAMILIES.get(hf_class)


def find_nemo_module(name: str, *, has_experts: bool = False) -> Family | None:
    """Return the family whose configurations a module of NeMo has; with experts: the one of models that have some."""
    found = [family for family in _FAMILIES.values() if name and family.nemo_module == name]
    return next((family for family in found if isinstance(family, MoeFamily) or not has_experts), None)


def find_dense(arch: Architecture, nemo_module: str) -> Family | None:
    """Find the class of a dense model: its module of NeMo's own, or else the first that computes the same."""
    own, known = find_nemo_module(nemo_module), parents()
    return next((family for family in (own, *known) if family in known and family.computes(arch)), None)


def parents() -> list[Family]:
    """Return the families of dense models that can be upcycled."""
    return [family for family in _FAMILIES.values() if not isinstance(family, MoeFamily)]


def targets() -> list[MoeFamily]:
    """Return the families of MoE models that stand alone."""
    return [family for family in _FAMILIES.values() if isinstance(family, MoeFamily) and not family.only_among_others]


def check_parent(arch: Architecture, where: str) -> None:
    """Check that a model can become one with experts, or with more of them.

    Args:
        arch: its architecture.
        where: how messages call it.

    Raises:
        CheckpointError: it has experts, and its class gets no more of them.
    """
    family = _FAMILIES.get(arch.hf_class)
    reason = family.no_parent_because if isinstance(family, MoeFamily) else ""
    if arch.router_score == "sigmoid" and not arch.norm_topk:
        reason = "whose scores are not divided by their sum (norm_topk_prob), as Megatron divides them"
    if arch.num_experts and reason:
        growing = [one.hf_class for one in targets() if not one.no_parent_because]
        raise CheckpointError(
            where,
            got=f"{arch.hf_class}, {reason}",
            expected=f"a dense model, or one of {', '.join(growing)}",
            fix="give the dense parent",
        )


def require_class(moe_arch: Architecture) -> None:
    """Check that a Hugging Face class can hold a model.

    Raises:
        SpecError: none can; the text says why.
    """
    if moe_arch.hf_class:
        return
    titles: dict[str, list[str]] = {}
    # Gemma 4's class with experts holds Gemma 4 alone, and no other does
    near = [family for family in targets() if bool(family.saved_as) is moe_arch.keeps_network]
    for family in near:
        titles.setdefault(next(family.unsupported(moe_arch)), []).append(family.title)
    fix = "keep the model in NeMo: it trains and evaluates there"
    if moe_arch.keeps_network:
        fix = "route with router_order=topk_softmax, with experts in every layer and no shared ones"
    if moe_arch.mamba or moe_arch.quantile_bias or moe_arch.output_gate:
        fix = "keep the model in Megatron-Bridge"
    wide = replace(moe_arch, sliding_window=None, window_pattern=None, local_rope_theta=None)
    if moe_arch.window and any(not any(family.unsupported(wide)) for family in targets()):
        fix += ", or if training sequences were no longer than the window, set sliding_window in config.json to null,"
        fix += " or where it has layer_types each of them to full_attention"
    for family in near:
        if list(family.unsupported(moe_arch)) == [f"{moe_arch.router_score} scores"]:
            kind = find_router_kind(family.router_score, pre_softmax=False)
            route = f"router_score='{kind.score}' with router_order='{kind.order}'"
            fix += f", or route by {route}, as {family.title} does"
    raise SpecError(
        "Hugging Face class for this MoE",
        got="; ".join(f"{reason} ({', '.join(names)})" for reason, names in titles.items()),
        expected=f"what {' or '.join(family.title for family in near)} can hold",
        fix=fix,
    )


def server_caveats(moe_arch: Architecture) -> tuple[str, ...]:
    """Return which servers are known not to serve a folder of this model as it is, and why."""
    family = find_family(moe_arch.hf_class)
    return tuple(family.caveats(moe_arch)) if isinstance(family, MoeFamily) else ()
