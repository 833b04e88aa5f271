"""Fills the chunks of a model whose parent this package has no family for; see `bridged`."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.core.models.gpt.gpt_model import GPTModel

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.mapping import find_mapping
from nemo_upcycle.online.plan import ParamPlan, RankCoords, group_plans
from nemo_upcycle.online.receipt import ParameterRecord, UpcycleReceipt
from nemo_upcycle.online.upcycle import fill, make_receipt, sha256_of
from nemo_upcycle.sources import DenseSource
from nemo_upcycle.sources.checks import require_finite
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.bridged import BridgedParent, BridgedPlan
from nemo_upcycle.utils.dtypes import dtype_name


#: What this package fills: in a layer with experts, everything in the network's place.
_EXPERTS = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<inner>mlp\.(?:router|experts|shared_experts)\..+)")
#: A network in Bridge's mappings.
_NETWORK = re.compile(r"(?P<model>.*?)decoder\.layers\.\*\.mlp\.linear_fc1\.weight")


def fill_bridged(chunks: Sequence[Any], folder: Path, spec: UpcycleSpec | None) -> UpcycleReceipt:
    """Fill this rank's chunks, all but the experts by Bridge's loader; a collective call, for it scatters tensors.

    Args:
        chunks: chunks of the model on this rank, as Bridge's provider has built them.
        folder: the dense checkpoint.
        spec: how to upcycle it; None loads it as it is.

    Returns:
        The receipt of this rank.

    Raises:
        SpecError: the model has no experts where the spec puts them.
        CheckpointError: a parameter has no source, a tensor is not used, or shapes disagree; nothing was written. Or a
            tensor holds NaN or infinity: the model is then unfinished.
    """
    start_s, parent = time.monotonic(), BridgedParent.of(folder)
    bridge, pretrained = parent.bridge._model_bridge, parent.bridge.hf_pretrained
    log = logging.getLogger(MegatronModelBridge.__module__)  # of experts it warns that nothing maps them
    level, log.level = log.level, logging.ERROR
    try:
        found = bridge.build_conversion_tasks(pretrained, [*chunks])
    finally:
        log.level = level
    tasks = [task for task in found if task and not (spec and _EXPERTS.search(task.global_param_name))]
    here = [task for task in tasks if task.megatron_module is not None]
    with parent.open() as dense:
        prefix, text = _text_model(chunks[0], bridge)
        scales = any(base.__name__ == "EmbeddingScalingMixin" for base in type(getattr(text, "embedding", 0)).__mro__)
        dense.architecture = replace(dense.architecture, scaled_embedding=scales)
        plan = parent.plan(spec, prefix) if spec else None
        plans = [one for chunk in chunks for one in _expert_plans(chunk, prefix, plan, parent)] if plan else []
        _check_parameters(chunks, here, is_tied=dense.architecture.tied_embeddings)
        used = {name for task in tasks for name in hf_names_of(task.mapping)} | {*_network_names(plan)}
        left_out = _left_out(dense, used, plan) if plan else {}
        bridge.build_conversion_tasks = lambda *_, **__: tasks
        try:
            bridge.load_weights_hf_to_megatron(pretrained, [*chunks])
        except ValueError as error:
            got, expected = " ".join(str(error).split()), "the shapes of Bridge's model of the class"
            raise CheckpointError(str(folder), got=got, expected=expected, fix="check its config.json") from None
        for task in here:
            require_finite(task.param_weight, " and ".join(hf_names_of(task.mapping)), dense)
        pairs = zip(fill(plans, dense, spec, None), (tensor for one in plans for tensor in one.tensors), strict=True)
        records = [replace(record, sha256=sha256_of(tensor)) for record, tensor in pairs]
        seconds = time.monotonic() - start_s
        receipt = make_receipt(text, dense, spec, plans, records, seconds=seconds, bytes_read=dense.bytes_read)
        present = {name: math.prod(dense.shape(name)) for name in dense.names() if name in used}
        theirs = [name for task in here for name in hf_names_of(task.mapping) if name in present]
        theirs_bytes = sum(present[name] * dense.dtype(name).itemsize for name in theirs)
    counted = sum(present.values())
    return replace(
        receipt,
        parameters=[*map(_record, here), *records],
        dense_params=counted,
        total_params=counted + receipt.total_params - receipt.dense_params,
        active_params=counted + receipt.active_params - receipt.dense_params,
        parent_active_params=counted,
        bytes_read=receipt.bytes_read + theirs_bytes,
        bytes_needed=receipt.bytes_needed + theirs_bytes,
        bytes_written=receipt.bytes_written + sum(task.param_weight.nbytes for task in here),
        left_out=left_out,
    )


def hf_names_of(mapping: Any) -> list[str]:
    """Return the Hugging Face tensors of one of Bridge's mappings."""
    return [mapping.hf_param] if isinstance(mapping.hf_param, str) else list(mapping.hf_param.values())


def _text_model(chunk: Any, bridge: Any) -> tuple[str, Any]:
    """Find the text model in a chunk, and how Bridge's names of it begin.

    Raises:
        CheckpointError: there is none whose networks Bridge maps.
    """
    for mapping in bridge.mapping_registry().get_all_mappings():
        if match := _NETWORK.fullmatch(mapping.megatron_param):
            found = operator.attrgetter(f"{match['model']}decoder")
            with contextlib.suppress(AttributeError):
                found(chunk)
                model = operator.attrgetter(match["model"].rstrip("."))(chunk) if match["model"] else chunk
                if isinstance(model, GPTModel):
                    return match["model"], model
    raise CheckpointError(
        "model",
        got=type(chunk).__name__,
        expected="a GPTModel, or one with a GPTModel in it, whose networks Bridge maps (mlp.linear_fc1)",
        fix="use another checkpoint",
    )


def _expert_plans(chunk: Any, prefix: str, plan: BridgedPlan, parent: BridgedParent) -> list[ParamPlan]:
    """Plan a chunk's experts, routers and shared experts.

    Raises:
        SpecError: they are not where the spec puts them.
        CheckpointError: a parameter has no source, or a shape is wrong.
    """
    assert plan.spec is not None
    text = operator.attrgetter(prefix.rstrip("."))(chunk) if prefix else chunk
    numbers = [layer.layer_number - 1 for layer in text.decoder.layers]
    mapped, found = [], set()
    for name, parameter in text.named_parameters():
        if match := _EXPERTS.fullmatch(name):
            layer, row = numbers[int(match["layer"])], find_mapping(match["inner"], in_layer=True)
            if row is None:
                raise CheckpointError(
                    "model parameters without a source", got=name, expected="none", fix="leave it out"
                )
            mapped.append((f"{prefix}{name}", parameter, layer, *row))
            found.add(layer)
    pattern = plan.spec.moe_pattern(plan.dense.num_layers)
    if found != {layer for layer in numbers if pattern[layer]}:
        raise parent.without_experts(type(text.decoder.layers[0]).__name__)
    return group_plans(mapped, text.config, plan, RankCoords.here())


def _network_names(plan: BridgedPlan | None) -> Iterator[str]:
    """Yield the dense tensors that become experts."""
    pattern = plan.spec.moe_pattern(plan.dense.num_layers) if plan and plan.spec else ()
    for layer, is_moe in enumerate(pattern):
        for mapping in plan.networks.values() if plan and is_moe else ():
            yield from (name.format(layer=layer) for name in mapping.hf)


def _check_parameters(chunks: Sequence[Any], here: Sequence[Any], *, is_tied: bool) -> None:
    """Check that Bridge fills all but experts; the output of tied embeddings, on a last stage, is sent there."""
    filled = {(task.vp_stage, task.param_name) for task in here}
    lacking = [
        name
        for stage, chunk in enumerate(chunks)
        for name, _ in chunk.named_parameters()
        if (stage, name) not in filled and not _EXPERTS.search(name) and not (is_tied and "output_layer" in name)
    ]
    if lacking:
        raise CheckpointError(
            "model parameters without a source",
            got=", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""),
            expected="a mapping of Bridge's, and its tensors in the parent",
            fix="check that config.json and weights belong together, and that the model is Bridge's of the class",
        )


def _left_out(dense: DenseSource, used: Collection[str], plan: BridgedPlan) -> dict[str, dict[str, int]]:
    """Count what Bridge's model does not have of the parent's files: layers that predict further tokens, speech.

    Raises:
        CheckpointError: it is a part of the layers.
    """
    spare = [name for name in dense.names() if name not in used and not name.endswith("inv_freq")]
    layers = plan.networks["fc2"].hf[0].partition("{layer}")[0]
    numbers = {name: name.removeprefix(layers).partition(".")[0] for name in spare if name.startswith(layers)}
    if lost := sorted(name for name, number in numbers.items() if int(number) < plan.dense.num_layers):
        raise CheckpointError(
            f"{dense.path}: tensors of layers that nothing takes",
            got=", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else ""),
            expected="those that Bridge's mappings of the class name, and no others",
            fix="check that config.json and weights belong together",
        )
    tied = "lm_head.weight" if plan.dense.tied_embeddings else ""
    parts: dict[str, dict[str, int]] = {}
    for name in spare:
        if not (tied and name.endswith(tied)):
            count = parts.setdefault(name.removeprefix("model.").partition(".")[0], {"tensors": 0, "bytes": 0})
            count["tensors"] += 1
            count["bytes"] += math.prod(dense.shape(name)) * dense.dtype(name).itemsize
    return parts


def _record(task: Any) -> ParameterRecord:
    """Return how a parameter is made that Bridge has filled."""
    weight, by = task.param_weight, type(task.mapping).__name__
    sources = tuple(hf_names_of(task.mapping))
    made_by = f"copied by Megatron-Bridge's {by}"
    return ParameterRecord(
        task.param_name, tuple(weight.shape), dtype_name(weight.dtype), made_by, sources, sha256_of(weight)
    )
