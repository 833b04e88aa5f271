"""Measurements of a Mixture-of-Experts model's routers and experts: load, dropped tokens, loss, distance.

Every rank counts for its own layers, in tensors whose sizes depend only on the model's configuration. The only
communication is one sum over all ranks at every step. The sum does not depend on which layers or experts a rank holds,
or on whether a router has run yet. Megatron's `track_moe_metrics` can leave ranks waiting for each other, because it
makes one reduction for each name that a rank happens to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from nemo_upcycle.models.architecture import BALANCING_BIASES
from nemo_upcycle.models.balancing import balancing_bias
from nemo_upcycle.models.mapping import find_mapping
from nemo_upcycle.models.mapping_table import BY_ROLE


#: An expert that gets less than this fraction of a balanced share counts as dead.
DEAD_BELOW = 0.01
#: Maps the kind of balancing to the loss's name in Megatron's tracker; any kind can be combined with the z-loss.
_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}
#: Names of a router's buffers for the biases that balance its experts.
_BIASES = tuple(BY_ROLE[role].megatron[0].rpartition(".")[2] for role in BALANCING_BIASES)
#: Number of neurons and of model dimensions that are sampled from an expert. With 3 x 32 x 32 weights a distance is
#: known to a few percent, and the samples of all experts of Llama 3 8B E8T2 fit into 6 MiB.
_SAMPLED = 32


class RouterHealth:
    """Watches the routers of this rank's chunks, and prepares the sums over all ranks on demand.

    Args:
        chunks: this rank's Megatron chunks, wrapped or not.
        config: the model's configuration.
        clears_losses: whether to clear the auxiliary losses that Megatron collects; if not, the trainer must clear
            them at the end of every step.
        layers: layers to describe, in order; None: all. In a HybridModel experts are layers of their own.

    Example:
        >>> health = RouterHealth(chunks, config)  # doctest: +SKIP
        >>> summed = sum_over_ranks(health.local(with_experts=False))  # after a step, on every rank
        >>> health.describe(summed)["load_cv"]  # one number a layer
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        config: Any,
        *,
        clears_losses: bool = True,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.config, self._clears_losses = config, clears_losses
        self._described = list(range(config.num_layers) if layers is None else layers)
        self._layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
        kinds = config.moe_router_load_balancing_type
        kinds = [*([kinds] if isinstance(kinds, str) else kinds), *(["z_loss"] if config.moe_z_loss_coeff else [])]
        self._kinds = [kind for kind in kinds if kind in _LOSSES]
        self._has_biases = bool(balancing_bias(config))
        self._counts_LE = torch.zeros(config.num_layers, config.num_moe_experts, dtype=torch.float64)
        self._slots_L = torch.zeros(config.num_layers, dtype=torch.float64)
        for module in self._layers:
            self._counts_LE = self._counts_LE.to(module.router.weight.device)
            module.router.register_forward_hook(self._counter(module.layer_number - 1))

    def _counter(self, layer: int) -> Any:
        def count(router: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            # Count only with gradients enabled, so that a micro-batch counts once even if it is recomputed.
            if router.training and torch.is_grad_enabled():
                probs_TE = outputs[0]  # after dropping; slots that pad to the capacity have a weight of zero
                self._counts_LE[layer] += (probs_TE.detach() > 0).sum(dim=0)
                self._slots_L[layer] += probs_TE.shape[0] * self.config.moe_router_topk

        return count

    def local(self, *, with_experts: bool) -> dict[str, torch.Tensor]:
        """Return this rank's counts since the last call, to be summed over all ranks.

        Args:
            with_experts: whether to sample the experts' weights as well; must be the same on all ranks.

        Returns:
            `counts` [L, E]: token slots processed; `slots` [L]: token slots requested (tokens times top-k); one entry
            [L] for each auxiliary loss; `balancing_bias_range` [L], if the model has such biases; `experts` [L, E,
            sampled weights], if requested.
        """
        parts = {"counts": self._counts_LE.clone(), "slots": self._slots_L.clone()}
        self._counts_LE.zero_()
        self._slots_L.zero_()
        for kind in self._kinds:
            parts[_LOSSES[kind]] = self._take_loss(kind)
        if self._has_biases:
            parts["balancing_bias_range"] = self._bias_range()
        if with_experts:
            parts["experts"] = self._sample_experts()
        return parts

    def _take_loss(self, kind: str) -> torch.Tensor:
        """Return this rank's part of each layer's loss without its coefficient; the parts sum up to the mean."""
        collected = get_moe_layer_wise_logging_tracker().get(_LOSSES[kind])
        if collected is None:
            return torch.zeros(self.config.num_layers, dtype=torch.float64)
        # Each rank of a tensor- and context-parallel group holds a part of the loss, and each replica of the group
        # holds the whole. For the global loss, the data-parallel ranks hold parts, too. For the z-loss, every rank
        # holds the mean over its own tokens.
        replicas = 1 if kind == "global_aux_loss" else parallel_state.get_data_parallel_world_size()
        replicas = _ranks_of_a_layer() if kind == "z_loss" else replicas
        values: torch.Tensor = collected["values"]
        values_L: torch.Tensor = values[: self.config.num_layers].double() / (replicas * get_num_microbatches())
        if self._clears_losses:
            values.zero_()
        return values_L

    def _bias_range(self) -> torch.Tensor:
        """Return the range of each layer's biases, [L]; every rank that holds a layer has all of its biases."""
        range_L = self._counts_LE.new_zeros(self.config.num_layers)
        for module in self._layers:
            (bias_E,) = (bias for name in _BIASES if (bias := getattr(module.router, name, None)) is not None)
            range_L[module.layer_number - 1] = (bias_E.max() - bias_E.min()) / _ranks_of_a_layer()
        return range_L

    def _sample_experts(self) -> torch.Tensor:
        """Return the same few weights of every expert, [L, E, samples]; only the first replica fills them in.

        With `overlap_param_gather` the shards of other ranks arrive during the next forward pass, so some weights are
        one step old.
        """
        config = self.config
        matrices = 3 if config.gated_linear_unit else 2
        neurons, columns = _spread(config.moe_ffn_hidden_size), _spread(config.hidden_size)
        shape = (config.num_layers, config.num_moe_experts, matrices, len(neurons), len(columns))
        samples = torch.zeros(shape, dtype=torch.float64, device=self._counts_LE.device)
        if parallel_state.get_expert_data_parallel_rank() == 0:
            shards = parallel_state.get_expert_tensor_parallel_world_size()
            width = config.moe_ffn_hidden_size // shards
            first = parallel_state.get_expert_tensor_parallel_rank() * width
            own = [index for index, neuron in enumerate(neurons) if first <= neuron < first + width]
            local_rows = [neurons[index] - first for index in own]
            for module in self._layers:
                for role, expert, weight in _expert_weights(module):
                    sample = samples[module.layer_number - 1, expert]
                    if role == "expert_fc2":
                        sample[-1, own] = weight[columns][:, local_rows].T.double()
                    elif role == "expert_fc1":  # the rows of the gate, then the rows of the up projection
                        for matrix in range(matrices - 1):
                            rows = [matrix * width + row for row in local_rows]
                            sample[matrix, own] = weight[rows][:, columns].double()
        return samples.flatten(2)

    def describe(self, summed: dict[str, torch.Tensor]) -> dict[str, list[float | None]]:
        """Return the router health of every layer; None for layers without experts.

        Args:
            summed: result of `local`, summed over all ranks.

        Returns:
            `load_min`, `load_max`: smallest and largest share of the processed token slots; `load_cv`: standard
            deviation of the shares, divided by their mean; `load_entropy`: entropy of the shares, divided by the
            entropy of perfect balance (1 is balanced); `dead_experts`: number of experts that get less than 1 % of a
            balanced share; `dropped`: share of the requested slots that exceeded the capacity; the auxiliary losses
            without their coefficients (balancing losses: 1 in perfect balance; `z_loss`: mean squared logsumexp of the
            logits); `balancing_bias_range`: highest minus lowest of the biases that balance the experts;
            `expert_distance`, if the experts were sampled: see `_distance`.
        """
        shares_LE, balanced = shares(summed["counts"]), 1 / self.config.num_moe_experts
        is_moe_L = summed["slots"] > 0
        dropped_L = 1 - summed["counts"].sum(dim=1) / summed["slots"].clamp(min=1)
        health = {
            "load_min": shares_LE.amin(dim=1),
            "load_max": shares_LE.amax(dim=1),
            "load_cv": shares_LE.std(dim=1, correction=0) / balanced,
            "load_entropy": torch.special.entr(shares_LE).sum(dim=1) / math.log(self.config.num_moe_experts),
            "dead_experts": (shares_LE < DEAD_BELOW * balanced).sum(dim=1),
            "dropped": dropped_L,
            **{name: summed[name] for name in (*_LOSSES.values(), "balancing_bias_range") if name in summed},
        }
        if "experts" in summed:
            health["expert_distance"] = self._distance(summed["experts"])
        rows, described = self._described, is_moe_L[self._described].tolist()
        pairs = {name: zip(values_L[rows].tolist(), described, strict=True) for name, values_L in health.items()}
        return {name: [round(value, 6) if is_moe else None for value, is_moe in row] for name, row in pairs.items()}

    def _distance(self, experts_LEW: torch.Tensor) -> torch.Tensor:
        """Return the mean distance of each layer's experts from their origin, divided by the norm of the origin.

        The mean of the experts is used as the origin. The mean is the common part of copies of one network. It needs
        no dense checkpoint in memory, and exists after a restart and in models that were never dense. If all experts
        drift together, the mean drifts with them. The number says how much the experts differ from each other (0 for
        copies). With granularity G the experts of a layer hold G different shards, and each shard has its own mean.
        """
        config, experts = self.config, experts_LEW.shape[1]
        parts, rest = divmod(config.ffn_hidden_size, config.moe_ffn_hidden_size)
        granularity = parts if not rest and experts % parts == 0 else 1
        copies_LCGW = experts_LEW.unflatten(1, (experts // granularity, granularity))
        origin_LCGW = copies_LCGW.mean(dim=1, keepdim=True)
        distance_LCG: torch.Tensor = (copies_LCGW - origin_LCGW).norm(dim=-1) / origin_LCGW.norm(dim=-1).clamp(
            min=1e-12
        )
        return distance_LCG.flatten(1).mean(dim=1)


def shares(counts_LE: torch.Tensor) -> torch.Tensor:
    """Return every expert's share of its layer's token slots, [L, E]; rows of zeros stay zero."""
    return counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)


def sum_over_ranks(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Sum every tensor over all ranks with a single reduction; return CPU tensors on the first rank, else None.

    All ranks must call this function with the same names and shapes. Only the first rank waits for the result.
    """
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flat = torch.cat([part.flatten().to(device, torch.float64) for part in parts.values()])
    torch.distributed.all_reduce(flat)
    if torch.distributed.get_rank() != 0:
        return None
    pieces = flat.cpu().split([part.numel() for part in parts.values()])
    return {name: piece.view(part.shape) for (name, part), piece in zip(parts.items(), pieces, strict=True)}


def _ranks_of_a_layer() -> int:
    """Return the number of ranks that hold the same router."""
    stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    return torch.distributed.get_world_size() // stages


def _spread(size: int) -> list[int]:
    """Return up to 32 indices that are evenly spread over `size` and independent of the layout."""
    number = min(_SAMPLED, size)
    return [index * size // number for index in range(number)]


def _expert_weights(module: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield role, expert number and weight for every parameter of a layer's routed experts on this rank."""
    for name, parameter in module.experts.named_parameters():
        name = name.replace(".to_wrap.", ".")  # LoRA wraps a layer as `to_wrap`, beside the adapters
        mapping, number = find_mapping(f"mlp.experts.{name}", in_layer=True) or (None, None)
        if mapping is not None and number is not None:
            yield mapping.role, module.local_expert_indices[number], parameter.detach()
