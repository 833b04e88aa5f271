"""Counts the activation memory of Megatron's own layers on the meta device, for comparison with the planner.

A layer of each kind runs forward under a rank's groups. Then the storages that the layer's graph keeps for the
backward pass are counted. Each storage counts once, and parameters do not count. Nothing is computed or allocated.
"""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.layer_settings import decoder_settings
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.memory import layer_bytes, layers_in_flight
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.utils.attributes import temporarily_set
from tests.megatron_ranks import transformer_config


#: Regular expression of module names in a Megatron layer -> memory term of the tensors that these modules keep.
_TERMS = {
    r"input_layernorm|post_self_attn_layernorm": "attention norm",
    r"post_mlp_layernorm": "network norm",
    r"self_attention\.linear_qkv": "qkv input",
    r"self_attention\.[qk]_layernorm": "query and key norms",
    r"self_attention.*": "attention",
    r"|pre_mlp_layernorm": "network norm",
    r"mlp\.router": "router",
    r"mlp\.experts.*\.linear_fc1": "expert input",
    r"mlp\.experts.*\.linear_fc2": "expert fc2 input",
    r"mlp\.experts.*": "expert fc1 output",
    r"mlp.*\.linear_fc2": "fc2 input",
    r"mlp.*": "fc1 output",
}
#: Terms that Megatron's local modules cannot show. The fused rotary kernel keeps neither cosines nor sines.
#: Transformer Engine's permutation keeps a map of 8 bytes per token and expert. Megatron's local permutation keeps 16
#: bytes per slot.
NOT_LOCAL = {"rotary", "dispatch"}


def kept_by_stage(arch: Architecture, layout: Layout, work: Workload, stage: int) -> dict[str, tuple[float, float]]:
    """Count the bytes that a stage's layers keep at the peak: memory term -> planned bytes, measured bytes.

    Both counts are for BF16. In FP8, linear layers keep smaller inputs, but FP8 needs Transformer Engine and a GPU.
    """
    work = replace(work, precision="bf16", low_params=False)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (moe, fp8, _), count in layers_in_flight(arch, layout, work, stage).items():
        planned, built = layer_bytes(arch, layout, work, moe, fp8).kept, kept_by_layer(arch, layout, work, moe)
        for number, layer in enumerate((planned, built)):
            for term, size in layer.items():
                sums[term][number] += count * size
    return {term: (planned, built) for term, (planned, built) in sums.items() if planned or built}


def kept_by_layer(arch: Architecture, layout: Layout, work: Workload, moe: bool) -> dict[str, float]:
    """Run a Megatron layer forward for one micro-batch, and count the bytes that a rank keeps, by memory term.

    Two modules are replaced. Flash attention replaces Megatron's local attention, which keeps s x s scores. A norm
    that keeps only its input, as fused norms do, replaces PyTorch's norm. Without a GPU, PyTorch's norm keeps float32
    copies.
    """
    from megatron.core import tensor_parallel

    # A layer is the same on every pipeline stage, so one stage is enough.
    layout = replace(layout, gpus=layout.gpus // layout.pp, pp=1, vp=1, first=None, last=None, embedding=0, loss=0)
    one_layer = replace(arch, num_layers=1, moe_pattern=None if moe or not arch.num_experts else (False,))
    length = work.seq_length // layout.cp
    shape = (length // layout.tp, layout.micro_batch, arch.hidden_size)
    hidden = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.empty(length, 1, 1, arch.head_dim, device="meta")
    with megatron_rank(layout, 0), _without_cuda():
        layer = _layer(one_layer, layout, work, moe)
        with _what_is_kept(layer, moe) as kept:

            def forward(hidden: torch.Tensor) -> Any:
                return layer(hidden, attention_mask=None, rotary_pos_emb=angles)[0]

            output = (
                tensor_parallel.checkpoint(forward, False, hidden) if work.recompute == "full" else forward(hidden)
            )
        terms = kept()
        del output  # frees the graph
    return terms


def _layer(arch: Architecture, layout: Layout, work: Workload, moe: bool) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from nemo_upcycle.online.decoder_layers import decoder_layers

    config = transformer_config(arch, layout)
    settings: dict[str, Any] = {
        "sequence_parallel": layout.tp > 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,  # needs Megatron's own kernels
        "bias_activation_fusion": arch.gated and (arch.activation == "silu" or not arch.num_experts),
    }
    if arch.num_experts:
        # Fix the number of slots, so that the router cannot change it. Use the auxiliary loss of the recipes.
        settings |= {
            "moe_token_dispatcher_type": "alltoall",
            "moe_expert_capacity_factor": work.buffer_slots_per_token(arch, layout.ep) / (arch.top_k or 1),
            "moe_pad_expert_input_to_capacity": True,
            "moe_aux_loss_coeff": 0.01,
        }
    if work.recompute not in ("none", "full"):
        settings |= {"recompute_granularity": "selective", "recompute_modules": work.recompute.split(",")}
    for name, value in settings.items():
        setattr(config, name, value)
    spec = decoder_layers(config, False, **decoder_settings(arch)).layer_specs[0]
    if arch.pre_norm:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = _FusedNorm
    if arch.post_norm:
        spec.params["norm"] = _FusedNorm
    attention = spec.submodules.self_attention.submodules
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = _FusedNorm
    attention.core_attention = _FlashAttention
    with torch.device("meta"):
        layer: Any = build_module(spec, config=config, layer_number=1).bfloat16()
    # Only the norm before the experts is recomputed: Transformer Engine fuses every other norm into a linear layer.
    layer.recompute_input_layernorm = False
    layer.recompute_pre_mlp_layernorm = moe and work.recomputes("layernorm")
    if moe:
        layer.mlp.router.layer_number = None  # so that the router's loss is not logged
    return layer


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Let Megatron's modules run on the meta device, without CUDA and without compilation.

    If Transformer Engine is missing, Megatron-Core 0.15 uses some undefined names. This function defines the names.
    """
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    changes: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: "meta"),
        (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", object()),
        (moe_utils, "te_general_gemm", None),
        (random, "_get_all_rng_states", lambda: ()),
        (random, "FP8GlobalStateManager", SimpleNamespace(is_fp8_enabled=lambda: False)),
        (random, "activation_recompute_forward", lambda **_: nullcontext()),
        (tensor_parallel, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=nullcontext)),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(temporarily_set(owner, name, value))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Kept:
    """A tensor that a graph keeps, and the module that saved it. The object lives as long as the graph needs it."""

    def __init__(self, tensor: torch.Tensor, module: str) -> None:
        self.tensor, self.module = tensor, module


@contextmanager
def _what_is_kept(layer: Any, moe: bool) -> Iterator[Callable[[], dict[str, float]]]:
    """Watch a layer while it runs.

    Yields:
        A function that counts the bytes kept by the layer's graph, by term. Call it while the output is alive.
    """
    running: list[str] = []
    inputs: dict[int, str] = {}  # storage -> memory term, whichever module saves the storage
    packed: list[weakref.ref[_Kept]] = []

    def watch(name: str, module: torch.nn.Module) -> None:
        def before(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            running.append(name)
            if name == "mlp":
                inputs[_storage(args[0])] = "network input"

        def after(*_: Any) -> None:
            running.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor, running[-1] if running else "input_layernorm")  # none: the whole layer is recomputed
        packed.append(weakref.ref(kept))
        return kept

    def by_term() -> dict[str, float]:
        seen = {_storage(parameter) for parameter in layer.parameters()}
        terms: dict[str, float] = defaultdict(float)
        for kept in [kept for reference in packed if (kept := reference()) is not None]:
            storage = _storage(kept.tensor)
            if storage not in seen:
                seen.add(storage)
                terms[inputs.get(storage) or _term(kept, moe)] += kept.tensor.untyped_storage().nbytes()
        return dict(terms)

    for name, module in layer.named_modules():
        watch(name, module)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield by_term


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _term(kept: _Kept, moe: bool) -> str:
    """Return the memory term of a kept tensor, which depends on the module that saved the tensor."""
    if kept.module == "self_attention" and kept.tensor.shape[1:3] == (1, 1):
        return "rotary"
    if kept.module == "self_attention.core_attention" and kept.tensor.dtype == torch.float32:
        return "softmax statistics"
    if kept.module == "mlp" and moe:
        return "dispatch"
    return next(term for pattern, term in _TERMS.items() if re.fullmatch(pattern, kept.module))


class _FusedNorm(torch.nn.RMSNorm):
    """A norm that keeps the same tensors as Transformer Engine's norms, and as PyTorch's norm on a GPU."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        normed: torch.Tensor = _KeepsInput.apply(tensor, self.weight)
        return normed


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Keep the whole input, and one float32 number per row."""
        tensor = tensor.contiguous()
        ctx.save_for_backward(tensor, weight, tensor.new_empty(tensor.shape[:-1], dtype=torch.float32))
        return torch.empty_like(tensor)


class _FlashAttention(torch.nn.Module):
    """PyTorch's flash attention, in place of Megatron's core attention."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Turn [S, B, H, K] into [S, B, H x K]. Each input is made contiguous, as in Transformer Engine."""
        parts = (part.contiguous().flatten(1, 2)[None] for part in (query, key, value))
        length = query.shape[0]
        flash = torch.ops.aten._flash_attention_forward
        output: torch.Tensor = flash(*parts, None, None, length, length, 0.0, True, False)[0]
        return output.view(*query.shape[:2], -1)
