"""Dense and upcycled models that are filled part by part while they compute, and never in memory as a whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.cpu.configuration import configure_for_cpu
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.hf_model import empty_model, stored_name
from nemo_upcycle.models.hybrid import hybrid_of
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.models.mapping_table import ParamMapping
from nemo_upcycle.models.sharding import float32_names
from nemo_upcycle.online.plan import ParamPlan
from nemo_upcycle.online.upcycle import checked_plans, fill
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.paging import PagedModel
from nemo_upcycle.trainers.trial import ON_META


#: Settings that replace a configuration's own to run the model on one rank.
_ONE_RANK: dict[str, Any] = ON_META | {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "sequence_parallel": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "moe_token_dispatcher_type": "alltoall",  # other dispatchers need several ranks
    "moe_flex_dispatcher_backend": "deepep",
    "moe_enable_deepep": False,
    "ep_overlap_early_attn_memory_release": False,
    "bf16": False,
    "fp16": False,
    "moe_router_padding_for_fp8": False,
    "moe_router_padding_for_quantization": False,
    "params_dtype": torch.float32,
    "autocast_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "moe_router_dtype": "fp64",  # never less precise than the activations, in float32 or float64
}


#: Names of a layer's router and experts in transformers 5, the same in every class.
_OF_5 = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.(?P<what>gate\.weight|experts\.(gate_up|down)_proj)")
_ROLES = {"gate.weight": "router", "experts.gate_up_proj": "expert_fc1", "experts.down_proj": "expert_fc2"}


def paged_megatron(config: Any, dense: DenseSource, spec: UpcycleSpec | None) -> tuple[PagedModel, list[ParamPlan]]:
    """Return a Megatron model on one rank whose parts are filled when they compute, and the plans that fill it.

    Args:
        config: a NeMo `GPTConfig` or a Megatron-Bridge model, of any layout; it stays unchanged.
        dense: the open dense checkpoint.
        spec: how to upcycle it; None for a dense model.

    Raises:
        SpecError, CheckpointError: as in `upcycle_into`.
    """
    arch, config = dense.architecture, _on_one_rank(config, dense.architecture.vocab_size)
    model = _built(config, arch).eval()
    plans = checked_plans([model], dense, spec)

    def fill_part(tensors: Mapping[str, torch.Tensor]) -> None:
        mine = [plan for plan in plans if plan.names[0] in tensors]
        fill([replace(plan, tensors=tuple(tensors[name] for name in plan.names)) for plan in mine], dense, spec, None)
        dense.release()

    fill([plan for plan in plans if plan.made_of.mapping.role in BALANCING_BIASES], dense, spec, None)  # these stay
    layers = [f"decoder.layers.{number}" for number in range(len(model.decoder.layers))]
    norm = "decoder.final_norm" if hybrid_of(model) else "decoder.final_layernorm"
    ends = [norm, *([] if arch.tied_embeddings else ["output_layer"])]
    stay = ["embedding"] if arch.tied_embeddings else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PagedModel(model, ["embedding", *layers, *ends], fill_part, stay=stay, device=device), plans


def _built(config: Any, arch: Architecture) -> Any:
    if hasattr(config, "configure_model"):
        model = config.configure_model(tokenizer=None)
        if arch.scaled_embedding:  # NeMo scales it in the class GemmaModel, not by a setting
            from nemo.collections.common.parts.utils import extend_instance
            from nemo.collections.llm.gpt.model.gemma2 import EmbeddingScalingMixin

            extend_instance(model.embedding, EmbeddingScalingMixin)
        return model
    config.finalize()
    return build_bridges(config, pre_process=True, post_process=True)


def build_bridges(config: Any, **place: Any) -> Any:
    """Build a chunk of a Megatron-Bridge model on the meta device.

    Args:
        config: Bridge's provider, or the configuration of one of Bridge's builders.
        place: position of the chunk: `pre_process`, `post_process`, `vp_stage`.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("meta"):  # a HybridModelProvider has no setting for the device
        if hasattr(config, "get_builder_cls"):
            configure_for_cpu(config)
            return config.get_builder_cls()(config).build_model(groups, **place)
        config._pg_collection = groups  # Bridge's Gemma looks up its stage there
        return config.provide(**place)


def _on_one_rank(config: Any, vocab_size: int) -> Any:
    """Return a copy of a config for one rank: in float32, without padding, on the meta device."""
    config = copy.deepcopy(config)
    for name, value in _ONE_RANK.items():
        if hasattr(config, name):  # some releases lack a field
            setattr(config, name, value)
    if hybrid := hybrid_of(config):
        config.hybrid_layer_pattern = hybrid.symbols
    config.vocab_size, config.should_pad_vocab = vocab_size, False
    configure_for_cpu(config)  # on a GPU, too: Transformer Engine has no float64
    return config


def paged_hugging_face(folder: Path, dense: DenseSource) -> PagedModel:
    """Return a Hugging Face model in float32 whose parts are filled when they compute.

    Args:
        folder: folder of the model.
        dense: the open checkpoint in this folder.
    """
    model = empty_model(folder)

    def fill_part(tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            _read_into(tensor, name, dense)
        dense.release()

    for name, buffer in model.named_buffers():
        if name in float32_names(dense.architecture):
            buffer.copy_(dense.read(name))
    layers = [f"model.layers.{number}" for number in range(dense.architecture.num_layers)]
    tied = dense.architecture.tied_embeddings
    parts = ["model.embed_tokens", *layers, "model.norm", *([] if tied else ["lm_head"])]
    return PagedModel(model, parts, fill_part, stay=["model.embed_tokens"] if tied else [])


def _read_into(tensor: torch.Tensor, name: str, dense: DenseSource) -> None:
    """Read a parameter of a Hugging Face model; transformers 5 stacks experts and uses one name for all routers."""
    name = stored_name(name, dense.architecture)
    found = None if name in dense.names() else _OF_5.fullmatch(name)
    if found is None:
        tensor.copy_(dense.read(name))
        return
    names = mapping_of(_ROLES[found["what"]], dense.architecture).hf
    for expert, rows in enumerate(tensor if len(names) > 1 or "{expert}" in names[0] else [tensor]):
        parts = [dense.read(one.format(layer=found["layer"], expert=expert)) for one in names]
        rows.copy_(torch.cat(parts))


class PagedWeights(LiveWeights):
    """Whole parameters of a paged Megatron model, for an export that reads them layer by layer.

    Args:
        paged: the model, in float32.
        dtype: type that holds the copies of dense weights without rounding.
    """

    def __init__(self, paged: PagedModel, dtype: torch.dtype) -> None:
        super().__init__(paged.model)
        self._paged, self._dtype = paged, dtype

    def dtype(self, mapping: ParamMapping, layer: int, expert: int) -> torch.dtype:
        """Return the type that holds a parameter exactly; random router weights may need all of float32."""
        return torch.float32 if mapping.role in ("router", *BALANCING_BIASES) else self._dtype

    def read(self, mapping: ParamMapping, layer: int, expert: int) -> torch.Tensor:
        """Return a parameter."""
        if mapping.role in BALANCING_BIASES:
            return super().read(mapping, layer, expert)
        weight: torch.Tensor = self._paged.only(self.name(mapping, layer, expert)).detach()
        return weight
