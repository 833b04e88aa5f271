"""Fills the Megatron model chunks of this rank from a dense checkpoint, in place: online upcycling.

Every rank reads only the dense slices that its own parameters are made of and expands them into its own expert shard
(the idea of arXiv 2412.09952, section 2.3). No dense model is built, nothing is gathered or sent between ranks.
The work is planned and checked as a whole first; nothing is written until the plan is sound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_upcycle.architecture import Architecture
from nemo_upcycle.errors import CheckpointError, SpecError, problem
from nemo_upcycle.init.experts import fill_copies
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.mapping import BY_ROLE, Cut, Piece, Row, Shard, find_row, hf_names, hf_shape, pieces, shard_shape
from nemo_upcycle.receipt import ParameterRecord, UpcycleReceipt
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.spec import UpcycleSpec


#: Called after every filled parameter with its name and the bytes written.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class _Target:
    """A parameter of this rank, or the same matrix of all its experts of one layer."""

    name: str
    row: Row
    layer: int | None
    tensors: list[torch.Tensor]
    source: Row | None
    pieces: list[Piece]

    def hf_name(self, part: int) -> str:
        assert self.source is not None
        return self.source.hf[part].format(layer=self.layer)


@dataclass(frozen=True)
class _Place:
    """Where this rank stands in the groups that cut tensors."""

    dense: Shard
    expert: Shard

    @staticmethod
    def here() -> _Place:
        from megatron.core import parallel_state as ps

        return _Place(
            Shard(ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()),
            Shard(ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()),
        )


def upcycle_into(
    chunks: Sequence[torch.nn.Module], dense: DenseSource, spec: UpcycleSpec, progress: Progress | None = None
) -> UpcycleReceipt:
    """Make the local chunks of an MoE model from a dense checkpoint, in place.

    Works under any `parallel_state`. For one seed the gathered model is bit-identical whatever the layout. Optimizers
    that keep master weights must reload them afterwards.

    Args:
        chunks: this rank's Megatron `GPTModel` chunks (wrapped or not), one per virtual pipeline stage.
        dense: the open dense checkpoint.
        spec: what to make of it.
        progress: called after every parameter.

    Returns:
        The receipt of this rank.

    Raises:
        SpecError: spec and model disagree. Nothing was written.
        CheckpointError: a parameter has no source, a source tensor is unused, or shapes disagree; nothing was written.

    Example:
        >>> with open_dense("hf:///models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     receipt = upcycle_into(model_chunks, dense, UpcycleSpec(num_experts=8, top_k=2))
    """
    models = [_unwrap(chunk) for chunk in chunks]
    for model in models:
        check_spec(model.config, spec)
    return _fill(models, dense, spec, progress)


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
    return _fill(models, dense, None, progress)


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
        SpecError: they disagree.
    """
    wanted = {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.top_k,
        "moe_router_pre_softmax": spec.router_order == "softmax_topk",
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": None,
        "moe_router_enable_expert_bias": False,
        "moe_shared_expert_intermediate_size": None,
    }
    for name, value in wanted.items():
        got = getattr(config, name, None)
        if got != value and not (not got and not value):
            raise SpecError(
                problem(
                    f"model.config.{name}", got=got, expected=f"{value} (from the UpcycleSpec)", fix="make them agree"
                )
            )


def _check_model(model: Any, arch: Architecture) -> None:
    config = model.config
    wanted = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "layernorm_epsilon": arch.norm_eps,
    }
    if config.num_moe_experts:
        wanted["moe_ffn_hidden_size"] = arch.ffn_size
    found = {name: getattr(config, name) for name in wanted}
    # NeMo's config holds the base, Megatron's does not: the model does. A wrong one changes the function unnoticed.
    wanted["rotary_base"], found["rotary_base"] = arch.rope_theta, model.rotary_base
    for name, value in wanted.items():
        if found[name] != value:
            expected, fix = f"{value}, as in the dense checkpoint", "use the dense model's own configuration"
            raise CheckpointError(problem(f"model.config.{name}", got=found[name], expected=expected, fix=fix))


def _fill(
    models: list[Any], dense: DenseSource, spec: UpcycleSpec | None, progress: Progress | None
) -> UpcycleReceipt:
    arch = dense.architecture
    _check_source(dense)
    for model in models:
        _check_model(model, arch)
    place = _Place.here()
    targets = [target for model in models for target in _targets(model, arch, place)]
    _check_shapes(targets, dense)
    _check_covered(targets, models, arch)
    start_s, bytes_before = time.monotonic(), dense.bytes_read
    for target in targets:
        _write(target, dense, spec, arch)
        if progress:
            progress(target.name, sum(tensor.nbytes for tensor in target.tensors))
    made = arch.with_experts(spec.num_experts, spec.top_k) if spec else arch
    return UpcycleReceipt(
        source=str(dense.path),
        source_files=dense.fingerprint(),
        spec=spec.to_dict() if spec else None,
        exact=spec.is_exact if spec else True,
        dense_params=arch.total_params,
        total_params=made.total_params,
        active_params=made.active_params,
        parameters=[_record(target, spec) for target in targets],
        bytes_read=dense.bytes_read - bytes_before,
        bytes_needed=_bytes_needed(targets, dense),
        bytes_written=sum(tensor.nbytes for target in targets for tensor in target.tensors),
        seconds=round(time.monotonic() - start_s, 3),
    )


def _targets(model: Any, arch: Architecture, place: _Place) -> Iterator[_Target]:
    """Yield what is to be filled; the same matrix of a layer's experts is one target."""
    grouped: dict[tuple[str, int | None], list[tuple[int, str, torch.Tensor]]] = {}
    unknown_names = []
    for name, parameter in model.named_parameters():
        layer, inner = _split(name, model)
        found = find_row(inner, in_layer=layer is not None)
        if found is None:
            unknown_names.append(name)
            continue
        row, expert = found
        grouped.setdefault((row.role, layer), []).append((expert or 0, name, parameter.data))
    if unknown_names:
        raise CheckpointError(
            problem(
                "model parameters without a source",
                got=", ".join(unknown_names[:5]),
                expected="parameters of a Llama-family model",
                fix="remove what the dense model does not have (biases, shared experts, other layer specs)",
            )
        )
    for (role, layer), members in grouped.items():
        members.sort(key=lambda member: member[0])
        yield _target(BY_ROLE[role], layer, members, arch, place)


def _split(name: str, model: Any) -> tuple[int | None, str]:
    """Return the layer's number in the whole model (None outside the layers) and the name inside it."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return None, name
    local, _, inner = name.removeprefix(prefix).partition(".")
    return model.decoder.layers[int(local)].layer_number - 1, inner


def _target(
    row: Row, layer: int | None, members: list[tuple[int, str, torch.Tensor]], arch: Architecture, place: _Place
) -> _Target:
    shard = place.expert if row.is_expert else place.dense
    name, tensors = members[0][1], [tensor for _, _, tensor in members]
    if row.role == "router":
        return _Target(name, row, layer, tensors, None, [])
    source = BY_ROLE[row.role.removeprefix("expert_")]
    if row.role == "output" and arch.tied_embeddings:
        source = BY_ROLE["embedding"]
    shape = tuple(tensors[0].shape)
    wanted = shard_shape(source, arch, shard, padded_vocab=shape[0] * shard.size)
    too_few = row.cut is Cut.VOCABULARY and shape[0] * shard.size < arch.vocab_size
    if shape != wanted or too_few:
        least = f"at least {arch.vocab_size} rows over all ranks"
        expected = least if too_few else f"{list(wanted)}, from {hf_shape(source, 0, arch)} over {shard.size} ranks"
        fix = "vocabulary and layout must fit the dense checkpoint"
        raise CheckpointError(problem(f"shape of {name}", got=list(shape), expected=expected, fix=fix))
    return _Target(name, row, layer, tensors, source, pieces(source, arch, shard, shape))


def _check_source(dense: DenseSource) -> None:
    """Check that the checkpoint holds what its architecture says and nothing else."""
    arch = dense.architecture
    expected = set(hf_names(arch))
    # Tied models may repeat the embedding; old ones store the rotary frequencies, which follow from the config.
    present = {name for name in dense.names() if not name.endswith("rotary_emb.inv_freq")}
    if arch.tied_embeddings:
        present.discard("lm_head.weight")
    for what, names in (("missing", expected - present), ("not used by this architecture", present - expected)):
        if names:
            raise CheckpointError(
                problem(
                    f"{dense.path}: tensors {what}",
                    got=", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
                    expected=f"exactly the {len(expected)} tensors of {arch.hf_class}",
                    fix="check that config.json and weights belong together",
                )
            )


def _check_shapes(targets: list[_Target], dense: DenseSource) -> None:
    """Check that the tensors that are read have the shapes that follow from `config.json`."""
    for target in targets:
        for part in range(len(target.source.hf) if target.source else 0):
            name, wanted = target.hf_name(part), hf_shape(target.source or target.row, part, dense.architecture)
            if dense.shape(name) != wanted:
                fix = "check that config.json and weights belong together"
                got, expected = list(dense.shape(name)), f"{list(wanted)} (from config.json)"
                raise CheckpointError(problem(f"{dense.path}: shape of {name}", got=got, expected=expected, fix=fix))


def _check_covered(targets: list[_Target], models: list[Any], arch: Architecture) -> None:
    """Check that every dense tensor of every local layer is used."""
    used = {target.hf_name(part) for target in targets if target.source for part in range(len(target.source.hf))}
    layers = {layer.layer_number - 1 for model in models for layer in model.decoder.layers}
    wanted = {name for name in hf_names(arch) if any(name.startswith(f"model.layers.{layer}.") for layer in layers)}
    if left := sorted(wanted - used):
        raise CheckpointError(
            problem(
                "dense tensors that no parameter takes",
                got=", ".join(left[:5]),
                expected="every tensor of a layer to be used",
                fix="use a model with the dense model's layers (MoE in every layer)",
            )
        )


def _write(target: _Target, dense: DenseSource, spec: UpcycleSpec | None, arch: Architecture) -> None:
    first = target.tensors[0]
    if target.row.role == "router":
        assert spec is not None
        assert target.layer is not None
        first.copy_(router_weight(spec, target.layer, arch.hidden_size))
        return
    covered = 0
    for piece in target.pieces:
        view = piece.view(first)
        slice_ = dense.read(target.hf_name(piece.part), piece.source)
        view.copy_(slice_.unflatten(0, view.shape[:2]))
        covered += view.numel()
    if covered < first.numel():  # the vocabulary's padding rows
        rows = covered // first[0].numel()
        first[rows:].zero_()
    if target.row.is_expert:
        scale = spec.down_scale if spec and target.row.role == "expert_fc2" else 1.0
        fill_copies(target.tensors, scale)


def _bytes_needed(targets: list[_Target], dense: DenseSource) -> int:
    """Return the bytes of the distinct slices that this rank's parameters are made of."""
    slices = {(target.hf_name(piece.part), piece.source) for target in targets for piece in target.pieces}
    return sum(
        math.prod(stop - start for start, stop in source) * dense.dtype(name).itemsize for name, source in slices
    )


def _record(target: _Target, spec: UpcycleSpec | None) -> ParameterRecord:
    first = target.tensors[0]
    sources: tuple[str, ...] = ()
    if target.row.role == "router":
        assert spec is not None
        made_by = f"router_init={spec.router_init}, std={spec.router_std}, seed={spec.seed}"
    else:
        sources = tuple(
            f"{target.hf_name(piece.part)}[{', '.join(f'{start}:{stop}' for start, stop in piece.source)}]"
            for piece in target.pieces
        )
        made_by = f"copied into {len(target.tensors)} experts" if target.row.is_expert else "copied"
    return ParameterRecord(target.name, tuple(first.shape), str(first.dtype).removeprefix("torch."), made_by, sources)
