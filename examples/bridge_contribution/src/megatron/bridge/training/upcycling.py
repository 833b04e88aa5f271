# Copyright (c) 2026, NVIDIA CORPORATION.  All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Initialize a Mixture-of-Experts model from a dense Hugging Face checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.module import MegatronModule

from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, WeightConversionTask
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.hf_pretrained.utils import is_safe_repo
from megatron.bridge.utils.common_utils import print_rank_0, warn_rank_0


if TYPE_CHECKING:
    from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training.config import CheckpointConfig

_Task = WeightConversionTask[MegatronParamMapping[Any]]

#: A parameter of an expert; what is left without the experts is the name in the dense network.
_EXPERT = re.compile(r"\.experts(?:\.local_experts\.\d+)?(\.linear_fc[12]\.(?:weight|bias))\d*$")
_ROUTER = re.compile(r"layers\.(\d+)\..*\brouter\.\w+$")
#: What has to agree with the dense model, for the upcycled one to compute the same.
_DENSE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "gated_linear_unit",
    "activation_func",
    "add_bias_linear",
    "add_qkv_bias",
    "share_embeddings_and_output_weights",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rope_scaling",
)


@dataclass(kw_only=True)
class UpcyclingConfig:
    """How a dense Hugging Face checkpoint becomes the Mixture-of-Experts model of a new run.

    Every expert starts as a copy of the dense feed-forward network of its layer, the router as random numbers, and
    everything else as the dense weights. A run that finds a checkpoint in ``checkpoint.load`` resumes from that, and
    has to keep this config: it is part of every checkpoint's ``run_config.yaml``.
    """

    hf_model_path: str
    """Dense Hugging Face checkpoint: a model id or a local directory."""

    num_experts: int
    """Experts per MoE layer."""

    top_k: int
    """Experts that compute each token."""

    router_init_std: float | None = None
    """Standard deviation of a router's weights. None takes the model's ``init_method_std``."""

    router_seed: int = 1234
    """Seed of the routers. Their weights depend on it and on the layer, not on the parallel layout."""

    def setup(self, model_config: GPTModelProvider | GPTModelConfig) -> None:
        """Give the dense model's config its experts, before it is finalized.

        Args:
            model_config: Config of the dense architecture; or with the same experts, where a recipe sets them already.

        Raises:
            ValueError: If the config asks for a model that copies of the dense network cannot fill.
        """
        transformer: Any = getattr(model_config, "transformer", model_config)
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"upcycling.top_k must be between 1 and num_experts ({self.num_experts}), got {self.top_k}"
            )
        dense_size = transformer.ffn_hidden_size
        for name, value in (("num_moe_experts", self.num_experts), ("moe_ffn_hidden_size", dense_size)):
            if getattr(transformer, name) not in (None, value):
                raise ValueError(f"upcycling needs model.{name}={value}, got {getattr(transformer, name)}")
            setattr(transformer, name, value)
        transformer.moe_router_topk = self.top_k
        for name in ("moe_shared_expert_intermediate_size", "moe_latent_size", "init_model_with_meta_device"):
            if getattr(transformer, name, None):
                raise ValueError(f"upcycling does not support model.{name}={getattr(transformer, name)}")
        if transformer.moe_router_pre_softmax and not transformer.moe_router_topk_scaling_factor:
            warn_rank_0(  # type: ignore[no-untyped-call]  # it has no types
                "model.moe_router_pre_softmax scales the experts' sum down to the probability of the chosen ones: the "
                "upcycled model does not start as the dense one. model.moe_router_topk_scaling_factor can restore it."
            )

    def verify_resume(self, run_config: Mapping[str, object]) -> None:
        """Refuse to resume from the checkpoint of a run that was upcycled in another way.

        Args:
            run_config: The checkpoint's ``run_config.yaml``.

        Raises:
            ValueError: If it was not upcycled, or with other settings.
        """
        saved = run_config.get("upcycling")
        if not isinstance(saved, Mapping):
            raise ValueError(
                "The checkpoint in checkpoint.load is not of an upcycled run. Set upcycling=None to resume from it, "
                "or another checkpoint.load to upcycle."
            )
        changed = {
            field.name: (saved.get(field.name), getattr(self, field.name))
            for field in fields(self)
            if saved.get(field.name) != getattr(self, field.name)
        }
        if changed:
            listed = ", ".join(f"{name} from {old!r} to {new!r}" for name, (old, new) in changed.items())
            raise ValueError(
                f"The upcycling config differs from the one in checkpoint.load: {listed}. A resumed run is not "
                "upcycled again. Keep the config, or set another checkpoint.load."
            )


class UpcyclingMappingRegistry(MegatronMappingRegistry):
    """A dense bridge's mappings, with those of experts and routers derived from them.

    A parameter of an expert has the Hugging Face source of the dense network's; a router's has none.

    Args:
        dense: Mappings of the dense model.
        router_seed: Seed of the routers.
        router_init_std: Standard deviation of the routers' weights.
    """

    def __init__(self, dense: MegatronMappingRegistry, *, router_seed: int, router_init_std: float) -> None:
        super().__init__(*dense.mappings)
        self.router_seed = router_seed
        self.router_init_std = router_init_std

    def megatron_to_hf_lookup(self, megatron_param_name: str) -> MegatronParamMapping[Any] | None:
        """Get the mapping of a Megatron parameter.

        Args:
            megatron_param_name: Global name of the parameter.

        Returns:
            The mapping, or None if the dense model has no source for the parameter.

        Raises:
            ValueError: If the dense network is made of its tensors in a way that experts cannot follow.
        """
        mapping: MegatronParamMapping[Any]
        if _ROUTER.search(megatron_param_name):
            mapping = _RouterMapping(megatron_param_name, seed=self.router_seed, std=self.router_init_std)
        else:
            dense = super().megatron_to_hf_lookup(_dense_name(megatron_param_name))
            if dense is None or dense.megatron_param == megatron_param_name:
                return dense
            # The name of an expert makes a mapping use the expert tensor parallel group.
            hf_param = dense.hf_param
            if type(dense) is GatedMLPMapping and isinstance(hf_param, dict):
                mapping = GatedMLPMapping(megatron_param_name, **hf_param)
            elif type(dense) is AutoMapping and isinstance(hf_param, str):
                mapping = AutoMapping(megatron_param_name, hf_param, dense.permute_dims)
            else:
                raise ValueError(
                    f"Upcycling does not support the {type(dense).__name__} of {dense.megatron_param}: a dense "
                    "network has to be mapped by GatedMLPMapping or AutoMapping"
                )
        return self._prepare_mapping(mapping)


class _RouterMapping(ReplicatedMapping):
    """Draws the weight of a router from the seed and its layer alone; all other state of a router is zero."""

    def __init__(self, megatron_param: str, *, seed: int, std: float) -> None:
        super().__init__(megatron_param, {})
        self.allow_hf_name_mismatch = True
        self.seed = seed
        self.std = std

    def hf_to_megatron(self, hf_weights: object, megatron_module: torch.nn.Module) -> torch.Tensor:
        """Return the same numbers on every rank; nothing is sent."""
        name = self.megatron_param.rpartition(".")[2]
        values = torch.zeros(getattr(megatron_module, name).shape, dtype=torch.float32)
        match = _ROUTER.search(self.megatron_param)
        if name == "weight" and match is not None:
            generator = torch.Generator().manual_seed(self.seed * 10_007 + int(match.group(1)))
            values.normal_(std=self.std, generator=generator)
        return values


def upcycle(config: UpcyclingConfig, model: list[MegatronModule]) -> list[MegatronModule]:
    """Fill this rank's part of an MoE model from a dense Hugging Face checkpoint.

    All ranks have to call it. Each dense tensor is read and converted once for all the experts of a rank.

    Args:
        config: How to upcycle.
        model: The model's chunks on this rank, before they are wrapped.

    Returns:
        The same chunks.

    Raises:
        ValueError: If the model is not the dense one with experts, or the checkpoint lacks a parameter.
    """
    trust_remote_code = is_safe_repo(hf_path=config.hf_model_path, trust_remote_code=None)
    auto_bridge = AutoBridge.from_hf_pretrained(config.hf_model_path, trust_remote_code=trust_remote_code)
    bridge, hf_pretrained, model_config = auto_bridge._model_bridge, auto_bridge.hf_pretrained, model[0].config
    dense_config = auto_bridge.to_megatron_provider(load_weights=False)
    dense_config.finalize()
    for name in _DENSE_FIELDS:
        expected = getattr(dense_config, name, None)
        if getattr(model_config, name, expected) != expected:
            raise ValueError(
                f"model.{name} is {getattr(model_config, name)}, but {expected} in the dense {config.hf_model_path}"
            )

    std = model_config.init_method_std if config.router_init_std is None else config.router_init_std
    registry = UpcyclingMappingRegistry(bridge.mapping_registry(), router_seed=config.router_seed, router_init_std=std)
    bridge.mapping_registry = lambda: registry  # type: ignore[method-assign]  # nothing else uses this instance
    tasks = [task for task in bridge.build_conversion_tasks(hf_pretrained, model) if task is not None]
    _verify_moe_layers(tasks, num_layers=model_config.num_layers, frequency=model_config.moe_layer_freq)
    _verify_sources(bridge, tasks, model)

    # One conversion fills the copies in all experts of this rank.
    copies: dict[tuple[int | None, str], tuple[_Task, list[torch.Tensor]]] = {}
    for task in tasks:
        if task.param_weight is not None:
            key = (task.vp_stage, _dense_name(task.global_param_name))
            copies.setdefault(key, (task, []))[1].append(task.param_weight)
    with torch.no_grad():
        for task, parameters in copies.values():
            assert task.megatron_module is not None
            hf_weights = bridge.maybe_modify_loaded_hf_weight(task.mapping.hf_param, hf_pretrained.state)
            weight = task.mapping.hf_to_megatron(hf_weights, task.megatron_module)
            for parameter in parameters:
                if parameter.shape != weight.shape:
                    raise ValueError(
                        f"{task.global_param_name} has shape {tuple(parameter.shape)}, but {task.mapping.hf_param} "
                        f"gives {tuple(weight.shape)}"
                    )
                parameter.copy_(weight)
    bridge._broadcast_shared_embeddings(model)
    print_rank_0(f"Upcycled {config.hf_model_path} to {config.num_experts} experts per MoE layer")
    return model


def create_upcycling_pre_wrap_hook(
    config: UpcyclingConfig, checkpoint: CheckpointConfig, resumes: Callable[[], bool]
) -> Callable[[list[MegatronModule]], list[MegatronModule]]:
    """Create the pre-wrap hook that upcycles a new run and guards one that resumes.

    Args:
        config: How to upcycle.
        checkpoint: Where a resumed run loads from.
        resumes: Whether a checkpoint is loaded into the model afterwards.

    Returns:
        A hook for the model config.
    """

    def upcycling_pre_wrap_hook(model: list[MegatronModule]) -> list[MegatronModule]:
        if not resumes():
            return upcycle(config, model)
        run_config = _read_saved_run_config(checkpoint)
        if run_config is not None:
            config.verify_resume(run_config)
        print_rank_0("Resuming from a checkpoint: the model is not upcycled again")
        return model

    return upcycling_pre_wrap_hook


def _read_saved_run_config(checkpoint: CheckpointConfig) -> Mapping[str, object] | None:
    """Return the run config beside the checkpoint that is loaded; None for a non-persistent one, which has none."""
    # These modules import the config, which imports this one.
    from megatron.bridge.training.checkpointing import _DIRECT_ITERATION_DIR_SENTINEL, _resolve_checkpoint_iteration
    from megatron.bridge.training.utils import checkpoint_utils

    folder = checkpoint.load
    if folder is None or not checkpoint_utils.checkpoint_exists(folder):
        return None
    iteration, release = _resolve_checkpoint_iteration(folder, checkpoint.ckpt_step)
    if iteration != _DIRECT_ITERATION_DIR_SENTINEL:
        folder = checkpoint_utils.get_checkpoint_name(folder, iteration, release)
    filename = checkpoint_utils.get_checkpoint_run_config_filename(folder)
    return checkpoint_utils.read_run_config(filename) if checkpoint_utils.file_exists(filename) else {}


def _dense_name(megatron_param: str) -> str:
    return _EXPERT.sub(r"\1", megatron_param)


def _verify_moe_layers(tasks: list[_Task], *, num_layers: int, frequency: int | list[int]) -> None:
    """Refuse a layer spec that leaves out experts which the config asks for."""
    pattern = frequency if isinstance(frequency, list) else [int(i % frequency == 0) for i in range(num_layers)]
    expected = {layer for layer, is_moe in enumerate(pattern) if is_moe}
    routers = (_ROUTER.search(task.global_param_name) for task in tasks if ".decoder." in f".{task.global_param_name}")
    found = {int(match.group(1)) for match in routers if match}
    if found != expected:
        raise ValueError(
            f"The model has experts in layers {sorted(found)}, but model.moe_layer_freq asks for {sorted(expected)}. "
            "Set a model.transformer_layer_spec that follows it, such as get_gpt_decoder_block_spec"
        )


def _verify_sources(
    bridge: MegatronModelBridge[Any, Any, Any],
    tasks: list[_Task],
    model: list[MegatronModule],
) -> None:
    """Refuse a model with a parameter that would keep its random numbers."""
    filled = {(task.vp_stage, task.param_name) for task in tasks if task.megatron_module is not None}
    tied = bridge._share_embeddings_and_output_weights(model[0].config)
    missing = [
        name
        for stage, chunk in enumerate(model)
        for name, _ in chunk.named_parameters()
        if (stage, bridge._unwrap_name(name)) not in filled and not (tied and "output_layer" in name)
    ]
    if missing:
        raise ValueError(f"The dense checkpoint has no source for {len(missing)} parameters, first {missing[:4]}")
