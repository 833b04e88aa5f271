"""Fills the Megatron model chunks of this rank from a dense checkpoint, in place: online upcycling.

Every rank reads only the dense slices that its own parameters are made of and expands them into its own expert shard
(the idea of arXiv 2412.09952, section 2.3). No dense model is built, nothing is gathered or sent between ranks.
The work is planned and checked as a whole first (`placement.py`); nothing is written until the plan is sound. Then
`filling.py` moves the bytes.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nemo_upcycle.architecture import Architecture, activation_of, same_frequencies
from nemo_upcycle.errors import CheckpointError, SpecError, problem
from nemo_upcycle.filling import Progress, fill, scale_of
from nemo_upcycle.placement import Place, Target, filled_bytes, targets_of
from nemo_upcycle.receipt import ParameterRecord, UpcycleReceipt
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.branches import require_copies
from nemo_upcycle.sources.checks import check_shapes, check_source, rounded_because
from nemo_upcycle.spec import UpcycleSpec, check_capacity


#: Settings of Megatron's that change the function and leave every shape as it is. No known parent has another value.
_PLAIN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "mrope_section": None,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
}
#: How every known parent is told positions; NeMo has these settings in its config, Megatron in its model alone.
_POSITIONS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,  # 1 is as good
}


def upcycle_into(
    chunks: Sequence[torch.nn.Module],
    dense: DenseSource,
    spec: UpcycleSpec,
    progress: Progress | None = None,
    *,
    hashes: bool = False,
) -> UpcycleReceipt:
    """Make the local chunks of an MoE model from a dense checkpoint, in place.

    Works under any `parallel_state`. For one seed the gathered model is bit-identical whatever the layout. Optimizers
    that keep master weights must reload them afterwards.

    Args:
        chunks: this rank's Megatron `GPTModel` chunks (wrapped or not), one per virtual pipeline stage.
        dense: the open dense checkpoint.
        spec: what to make of it.
        progress: called after every parameter.
        hashes: note the sha256 of every parameter in the receipt, which takes longer than the upcycling.

    Returns:
        The receipt of this rank.

    Raises:
        SpecError: spec and model disagree. Nothing was written.
        CheckpointError: a parameter has no source, a source tensor is unused, or shapes disagree; nothing was written.
            Or a dense tensor holds NaN or infinity: the model is then unfinished.

    Example:
        >>> with open_dense("hf:///models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     receipt = upcycle_into(model_chunks, dense, UpcycleSpec(num_experts=8, top_k=2))
    """
    models = [_unwrap(chunk) for chunk in chunks]
    for model in models:
        check_spec(model.config, spec)
    return _fill(models, dense, spec, progress, hashes)


def load_dense_into(
    chunks: Sequence[torch.nn.Module], dense: DenseSource, progress: Progress | None = None
) -> UpcycleReceipt:
    """Load a dense checkpoint into the local chunks of a dense Megatron model, in place, by the same mapping.

    Args, Returns and Raises as in `upcycle_into`.
    """
    models = [_unwrap(chunk) for chunk in chunks]
    for model in models:
        if model.config.num_moe_experts:
            raise SpecError(
                problem("num_moe_experts", got=model.config.num_moe_experts, expected="none", fix="use upcycle_into")
            )
    return _fill(models, dense, None, progress, False)


def _unwrap(chunk: Any) -> Any:
    # Not by attribute: NeMo's wrappers hand out what is inside them, under other parameter names than their own.
    while "decoder" not in chunk._modules:
        if "module" not in chunk._modules:
            raise SpecError(
                problem("model chunk", got=type(chunk).__name__, expected="a Megatron GPTModel", fix="pass the chunks")
            )
        chunk = chunk.module
    return chunk


def check_spec(config: Any, spec: UpcycleSpec) -> None:
    """Check that a model's configuration is what a spec asks for.

    Args:
        config: Megatron's or NeMo's, built or as a `run.Config`.
        spec: what the model is to be made by.

    Raises:
        SpecError: they disagree, or the configuration makes a router that no spec can be exact with.
    """
    scaling = None if spec.routed_scaling == 1 else spec.routed_scaling
    wanted: dict[str, Any] = {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.top_k,
        "moe_router_pre_softmax": spec.router_order == "softmax_topk",
        "moe_router_score_function": spec.router_score,
        "moe_router_topk_scaling_factor": scaling,
        "moe_router_enable_expert_bias": False,  # the spec says nothing of it
        "moe_router_num_groups": None,  # choosing among groups of experts would tear copies apart
        "moe_apply_probs_on_input": False,  # the network is not linear in its input
        "moe_router_force_load_balancing": False,  # random routing, for benchmarks
    }
    for name, value in wanted.items():
        got = getattr(config, name, None)
        if got != value and not (not got and not value) and not (value is None and got == 1):
            raise SpecError(
                problem(
                    f"model.config.{name}", got=got, expected=f"{value} (from the UpcycleSpec)", fix="make them agree"
                )
            )
    for name, value in _POSITIONS.items():
        if (got := getattr(config, name, value)) not in (value, value or 1):
            expected, fix = f"{value}, as in every dense parent", "leave it at that"
            raise SpecError(problem(f"model.config.{name}", got=got, expected=expected, fix=fix))
    capacity = getattr(config, "moe_expert_capacity_factor", None)
    pad = bool(getattr(config, "moe_pad_expert_input_to_capacity", False))
    # Megatron takes a negative factor for none.
    check_capacity(None if capacity is None or capacity < 0 else capacity, pad, spec.num_experts, spec.top_k)
    if (routing := getattr(config, "moe_router_load_balancing_type", None)) == "sinkhorn":
        expected, fix = "a type that leaves the router's scores alone", "use aux_loss or none"
        name = "model.config.moe_router_load_balancing_type"
        raise SpecError(problem(name, got=routing, expected=expected, fix=fix))
    frequency, layers = getattr(config, "moe_layer_freq", 1), config.num_layers
    pattern = [layer % frequency == 0 for layer in range(layers)] if isinstance(frequency, int) else frequency
    if (want := spec.moe_pattern(layers)) != tuple(map(bool, pattern)):
        expected = f"{[int(is_moe) for is_moe in want]} (moe_layers={spec.moe_layers})"
        got = frequency if isinstance(frequency, int) else list(frequency)
        raise SpecError(problem("model.config.moe_layer_freq", got=got, expected=expected, fix="make them agree"))


def _check_model(model: Any, made: Architecture) -> None:
    config, rotary = model.config, getattr(model, "rotary_pos_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    wanted: dict[str, Any] = {
        "num_layers": made.num_layers,
        "hidden_size": made.hidden_size,
        "ffn_hidden_size": made.ffn_size,
        "num_attention_heads": made.num_heads,
        "num_query_groups": made.num_kv_heads,
        "kv_channels": made.head_dim,
        "gated_linear_unit": made.gated,
        "layernorm_epsilon": made.norm_eps,
        "layernorm_zero_centered_gamma": made.zero_centered_norm,
    }
    if config.num_moe_experts:
        wanted["moe_ffn_hidden_size"] = made.expert_ffn_size or made.ffn_size
        wanted["moe_shared_expert_intermediate_size"] = made.shared_ffn_size or None
    checks: list[tuple[str, Any, Any]] = [(name, getattr(config, name), value) for name, value in wanted.items()]
    # Before all others: a model with other position embeddings may have no rotary ones.
    for name, value in _POSITIONS.items():
        got = getattr(model, name, getattr(rotary, name, value))
        checks.append((name, value if got == 1 else got, value))
    checks += [(name, getattr(config, name, value) or value, value) for name, value in _PLAIN.items()]
    if config.softmax_scale and not math.isclose(config.softmax_scale, made.head_dim**-0.5, rel_tol=1e-6):
        checks.append(("softmax_scale", config.softmax_scale, f"None or {made.head_dim**-0.5:.6g}"))
    # What follows changes the function unnoticed. NeMo scales the rotary frequencies outside of its config.
    checks.append(("activation_func", activation_of(config.activation_func), made.activation))
    if frequencies is not None and not frequencies.is_meta and not same_frequencies(frequencies, made):
        got = f"rotary_base {model.rotary_base:g}, frequencies down to {float(frequencies[-1]):.4g}"
        expected = f"rope_theta {made.rope_theta:g}, rope_scaling {made.rope_scaling}"
        checks.append(("rotary_base and RoPE scaling", got, expected))
    for name, got, value in checks:
        if got != value:
            expected, fix = f"{value}, as in the dense checkpoint", "use the dense model's own configuration"
            raise CheckpointError(problem(f"model.config.{name}", got=got, expected=expected, fix=fix))


def _fill(
    models: list[Any], dense: DenseSource, spec: UpcycleSpec | None, progress: Progress | None, hashes: bool
) -> UpcycleReceipt:
    arch = dense.architecture
    made = arch.upcycled(spec) if spec else arch
    check_source(dense, sampled=True)
    for model in models:
        _check_model(model, made)
    place, branches = Place.here(), len(dense.branches())
    targets = [
        target for model in models for target in targets_of(model, arch, made, spec, place, lambda c: c % branches)
    ]
    check_shapes(dense, sorted({target.hf_name(piece.part) for target in targets for piece in target.pieces}))
    if spec:
        require_copies(dense, spec.copies)
    start_s, bytes_before = time.monotonic(), dense.bytes_read
    fill(targets, dense, spec, progress)
    seconds = time.monotonic() - start_s
    dtypes = dict.fromkeys(target.tensors[0].dtype for target in targets if target.pieces)
    reasons = (
        *(spec.inexact_because if spec else ()),
        *dense.inexact_because(),
        *(why for dtype in dtypes for why in rounded_because(dense, dtype, spec)),
        *_changed_by(models[0], arch, spec),
    )
    return UpcycleReceipt(
        source=str(dense.path),
        source_files=dense.fingerprint(),
        spec=spec.to_dict() if spec else None,
        exact=not reasons,
        inexact_because=list(reasons),
        dense_params=arch.total_params,
        total_params=made.total_params,
        active_params=made.active_params,
        parameters=[record for target in targets for record in _records(target, spec, hashes)],
        bytes_read=dense.bytes_read - bytes_before,
        bytes_needed=_bytes_needed(targets, dense),
        bytes_written=sum(tensor.nbytes for target in targets for tensor in target.tensors),
        seconds=round(seconds, 3),
        peak_rss_gib=round(_peak_rss_gib(), 3),
    )


def _changed_by(model: Any, dense: Architecture, spec: UpcycleSpec | None) -> Iterator[str]:
    """Yield why a model whose weights are exact is not: experts that overflow drop tokens, attention sees others."""
    config = model.config
    factor = config.moe_expert_capacity_factor
    if spec and factor is not None and factor >= 0 and factor * spec.top_k < spec.num_experts:
        yield f"moe_expert_capacity_factor={factor} drops the tokens of experts that overflow"
    # Megatron counts the tokens before the current one (NeMo's import forgets that), Hugging Face that one, too.
    tokens, window = min(dense.max_positions, model.max_sequence_length), config.window_size
    seen = window[0] + 1 if window and window[0] >= 0 else tokens
    wanted = dense.sliding_window or tokens
    if min(seen, tokens) != min(wanted, tokens) or (seen < tokens and config.window_attn_skip_freq):
        exact = (wanted - 1, 0) if dense.sliding_window else None
        yield f"window_size={window} is not the dense model's attention: {exact} in every layer would be"
    # Gemma multiplies its embedding by the root of D; NeMo's model class does so, Megatron's has no setting for it.
    scales = any(base.__name__ == "EmbeddingScalingMixin" for base in type(getattr(model, "embedding", None)).__mro__)
    if model.pre_process and scales is not dense.scaled_embedding:
        done = ("does not multiply", "multiplies")[scales]
        yield f"the model {done} its embedding by sqrt(hidden_size), unlike the dense one: see NeMo's GemmaModel"


def _bytes_needed(targets: list[Target], dense: DenseSource) -> int:
    """Return the bytes of the distinct slices that this rank's parameters are made of."""
    slices = {(target.branch, *slice_) for target in targets for slice_ in filled_bytes(target)}
    return sum(
        math.prod(stop - start for start, stop in source) * dense.dtype(name).itemsize for _, name, source in slices
    )


def _records(target: Target, spec: UpcycleSpec | None, hashes: bool) -> list[ParameterRecord]:
    sources: tuple[str, ...] = ()
    if target.row.role == "router":
        assert spec is not None
        made_by = f"router_init={spec.router_init}, std={spec.router_std}, seed={spec.seed}"
    elif target.row.role == "router_bias":
        made_by = "zero"
    else:
        branch = f"{target.branch}:" if target.branch else ""
        sources = tuple(
            f"{branch}{name}[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"
            for name, bounds in filled_bytes(target)
        )
        made_by = "copied" if (scale := scale_of(target, spec)) == 1 else f"copied, times {scale:.6g}"
        if spec and target.experts and spec.method != "copy" and target.tensors[0].dim() > 1:
            amount = {"noise": f"std {spec.noise_std}", "drop": f"ratio {spec.drop_ratio}"}[spec.method]
            made_by += f", {spec.method} ({amount}, seed {spec.seed})"
    first = target.tensors[0]
    shape, dtype = tuple(first.shape), str(first.dtype).removeprefix("torch.")
    return [
        ParameterRecord(name, shape, dtype, made_by, sources, _sha256(tensor) if hashes else None)
        for name, tensor in zip(target.names, target.tensors, strict=True)
    ]


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
