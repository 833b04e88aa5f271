"""Random dense parents and specs, and the comparison of each parent with its converted model in transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.mapping import as_written
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.checks import check_source
from tests import models, parents
from tests.models import hugging_face_logits, sample_tokens


VOCABULARY = 250
#: Returns a folder's logits, and checks that no tensor is missing or unexpected.
logits = partial(hugging_face_logits, strict=True)
PARENTS = {
    "Llama": models.write_llama,
    "Qwen2": models.write_qwen2,
    "Qwen3": models.write_qwen3,
    "OLMo 2": models.write_olmo2,
    "OLMo 3": parents.write_olmo3,
    "Phi-3": models.write_phi3,
    "SmolLM3": models.write_smollm3,
    "EXAONE 4": models.write_exaone4,
    "Granite 3": parents.write_granite,
    "Granite 4": parents.write_granite4,
    "Gemma": parents.write_gemma,
    "Gemma 3": parents.write_gemma3,
    "InternLM3": parents.write_internlm3,
    "IQuest-Coder": parents.write_iquest_coder,
    "EXAONE 3": parents.write_exaone3,
    "Seed-OSS": parents.write_seed_oss,
    "Arcee": parents.write_arcee,
    **({"HyperCLOVA X": parents.write_hyperclovax} if hasattr(transformers, "HyperCLOVAXConfig") else {}),
    **({"Ministral 3": parents.write_ministral3} if hasattr(transformers, "Ministral3ForCausalLM") else {}),
    **({"Gemma 4": parents.write_gemma4} if hasattr(transformers, "Gemma4Config") else {}),
    **({"GraniteSWA": parents.write_granite_swa} if hasattr(transformers, "GraniteSWAConfig") else {}),
    **({"CWM": parents.write_cwm} if hasattr(transformers, "CwmForCausalLM") else {}),
}
#: Parents without a setting for the head size, which is the hidden size divided by the number of heads.
_NO_HEAD_DIM = (
    *("Qwen2", "OLMo 2", "OLMo 3", "Phi-3", "SmolLM3"),
    *("Granite 3", "Granite 4", "GraniteSWA", "HyperCLOVA X"),
)


class Case(NamedTuple):
    """A parent, and the spec of the model made from it.

    Args:
        parent: key of `PARENTS`.
        sizes: settings of the parent's configuration.
        spec: fields of the `UpcycleSpec`.
    """

    parent: str
    sizes: dict[str, Any]
    spec: dict[str, Any]


def random_case(seed: int, kinds: Sequence[str] = (*PARENTS, "Qwen3", "OLMo 2", "Phi-3")) -> Case:
    """Return a parent out of `kinds`, and a spec; the seed decides both."""
    draw = random.Random(seed)
    parent = draw.choice(kinds)
    groups, per_group = draw.choice([1, 2, 4]), draw.choice([1, 2, 3])
    head_dim = draw.choice([8, 16, 32])
    heads = groups * per_group
    # transformers 5 requires a hidden size that is a multiple of the number of heads; heads may have any width.
    hidden = heads * (head_dim if parent in _NO_HEAD_DIM else draw.choice([8, 16, head_dim]))
    sizes = {
        **{"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": hidden},
        **({} if parent in _NO_HEAD_DIM else {"head_dim": head_dim}),
        **{"intermediate_size": draw.choice([48, 96, 144]), "layers": draw.choice([1, 2, 3, 4])},
        **{"tied": draw.random() < 0.5, "rope_theta": draw.choice([10000.0, 1e6]), "rms_norm_eps": 1e-6},
    }
    if parent == "Phi-3":
        sizes |= _of_phi3(draw, head_dim)
    if parent == "HyperCLOVA X":
        sizes["use_post_norm"] = draw.random() < 0.3
    if parent.startswith(("Granite", "Hyper")):
        sizes |= {"attention_multiplier": draw.choice([0.0625, 0.3]), "embedding_multiplier": draw.choice([1.0, 12.0])}
        sizes |= {"residual_multiplier": draw.choice([1.0, 0.22]), "logits_scaling": draw.choice([1.0, 10.0])}
    if parent == "Gemma 4":  # each kind of layer has its own rotary base
        sizes["rope_theta"] = None
    if parent in _LAYERS_DIFFER:
        sizes |= _LAYERS_DIFFER[parent](draw, sizes["layers"])
    granularity, copies = draw.choice([1, 1, 2, 4]), draw.choice([2, 4, 8])
    experts = granularity * copies
    spec: dict[str, Any] = {
        **{"num_experts": experts, "granularity": granularity, "seed": draw.randrange(1000)},
        "top_k": granularity * draw.choice([one for one in (1, 2, 3) if one < copies]),
        "router_init": draw.choice(["normal", "uniform"]),
        "router_std": draw.choice([0.02, 1.0]),
    }
    if draw.random() < 0.3:
        spec |= {"router_score": "sigmoid", "routed_scaling_factor": draw.choice([1.0, 2.5])}
    elif draw.random() < 0.2:
        spec["router_order"] = "softmax_topk"
    if draw.random() < 0.3:
        spec["shared_experts"] = draw.randint(1, granularity)
    if sizes["layers"] > 1 and draw.random() < 0.4:
        first = draw.randrange(1, sizes["layers"])
        spec["moe_layers"] = draw.choice([",".join(map(str, range(first, sizes["layers"]))), "every-2"])
    if spec["top_k"] == 1 and "router_score" not in spec:
        spec["router_order"] = "softmax_topk"
    if draw.random() < 0.15:
        spec["method"] = draw.choice(["noise", "drop"])
    if "router_score" not in spec and draw.random() < 0.3:
        spec["routed_scaling_factor"] = draw.choice([2.5, 4.0])
    return Case(parent, sizes, spec)


def _of_phi3(draw: random.Random, head_dim: int) -> dict[str, Any]:
    """Return settings that only a Phi-3 has, for partly rotated heads, LongRoPE and a window."""
    part = draw.choice([1.0, 1.0, 0.75])
    sizes: dict[str, Any] = {"partial_rotary_factor": part, "sliding_window": draw.choice([None, 7])}
    if draw.random() < 0.5:
        count = int(head_dim * part) // 2
        factors = {name: [1 + 9 * draw.random() for _ in range(count)] for name in ("short_factor", "long_factor")}
        sizes |= {"rope_scaling": factors | {"type": "longrope"}}
        sizes |= {"original_max_position_embeddings": draw.choice([16, 64]), "max_position_embeddings": 128}
    return sizes


def _kinds(draw: random.Random, layers: int) -> dict[str, Any]:
    """Return which layers have a window: the default ones, all, none, or random ones."""
    kinds = ("sliding_attention", "full_attention")
    chosen = draw.choice([None, [kinds[0]] * layers, [kinds[1]] * layers, [draw.choice(kinds) for _ in range(layers)]])
    return {"layer_types": chosen, "window": draw.choice([5, 9])}


def _positions(draw: random.Random, layers: int) -> dict[str, Any]:
    """Return which layers of a SmolLM3 have positions: the default ones, all, or random ones."""
    chosen = [None, [1] * layers, [1] * layers, [draw.randint(0, 1) for _ in range(layers)]]
    return {"no_rope_layers": draw.choice(chosen), "no_rope_layer_interval": draw.choice([2, 4])}


def _thetas(draw: random.Random, layers: int) -> dict[str, Any]:
    """Return which layers have a window, and which layers have positions."""
    thetas = [draw.choice([0.0, 1e5]) for _ in range(layers)]
    return _kinds(draw, layers) | {"rope_theta": 1e5, "layer_rope_theta": thetas}


#: Parent with different kinds of layers -> function that draws the kind of each layer.
_LAYERS_DIFFER = {
    "OLMo 3": _kinds,
    "EXAONE 4": _kinds,
    "Gemma 3": _kinds,
    "Gemma 4": _kinds,
    "CWM": _kinds,
    "SmolLM3": _positions,
    "GraniteSWA": _thetas,
}


class Outcome(NamedTuple):
    """Result of a case.

    Args:
        hf_class: class of the converted model.
        is_exact: whether the conversion claims to compute the parent's function.
        relative: distance between both models' logits, divided by the norm of the parent's logits (float32).
    """

    hf_class: str
    is_exact: bool
    relative: float


def outcome(case: Case, folder: Path) -> Outcome:
    """Write the parent of a case, convert it, and compare the logits of both models in transformers.

    Raises:
        SpecError: No class can represent the model.
        AssertionError: A tensor is missing or unexpected.
    """
    dense = PARENTS[case.parent](folder / "dense", vocab_size=VOCABULARY, **case.sizes)
    return outcome_of(dense, UpcycleSpec(**case.spec), folder)


def outcome_of(dense: Path, spec: UpcycleSpec, folder: Path) -> Outcome:
    """Convert a parent, and compare the logits of both models in transformers; see `outcome`."""
    with open_dense(dense) as source:
        _check_read(source)
        done = convert(source, folder / "moe", spec, progress=False)
    _check_read_back(dense, folder / "moe", spec)
    if not hasattr(transformers, done.hf_class.partition(" ")[0]):
        pytest.skip(f"transformers {transformers.__version__} does not know {done.hf_class}")
    tokens = sample_tokens(VOCABULARY)
    wanted, got = (logits(path, tokens) for path in (dense, folder / "moe"))
    return Outcome(done.hf_class, done.exact, float((got - wanted).norm() / wanted.norm()))


def _check_read(source: DenseSource) -> None:
    """Check that the package and transformers agree on tensors, and on the layers with windows or positions."""
    check_source(source)
    arch = source.architecture
    if (family := find_family(arch.hf_class)) and family.computed_as:
        return
    config = transformers.AutoConfig.from_pretrained(source.path)
    if hasattr(config, "no_rope_layers"):
        assert [*map(bool, config.no_rope_layers)] == [*(arch.rope_pattern or [True] * arch.num_layers)]
    kinds = getattr(config, "layer_types", None) or []
    assert [kind == "sliding_attention" for kind in kinds] == [
        arch.window_of(n) is not None for n in range(len(kinds))
    ]


def _check_read_back(dense: Path, moe: Path, spec: UpcycleSpec) -> None:
    """Check that the folder's configuration describes the intended model."""
    wanted, found = read_architecture(dense).upcycled(spec), read_architecture(moe)
    # Mixtral's configuration has only one width, the width of the experts.
    assert found == replace(as_written(wanted), ffn_size=found.ffn_size)
