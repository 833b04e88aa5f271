"""Let Megatron-Core run on a CPU: each function replaces one thing that Megatron-Core would need CUDA for.

Each docstring says what breaks without the function. `use_cpu_backend` calls all of `PATCHES` once, and only if there
is no CUDA device. Deleting a line of `PATCHES` removes that patch and no other. Megatron's own checks stay in force. A
patch gives the code the value that the code asks for, or the value that the code gets on a GPU.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from nemo_upcycle.cpu.checkpoints import copy_views_as_they_are_written, write_checkpoints_without_threads
from nemo_upcycle.cpu.configuration import configure_for_cpu
from nemo_upcycle.cpu.device import place_tensors_on_cpu, with_cuda_type_names
from nemo_upcycle.cpu.fp8_linear import emulate_fp8


def adapt_every_config() -> None:
    """Configure a model for the CPU when it is made, before Megatron checks it.

    Without this patch a stock `Llama3Config8B()` cannot even be constructed: "apply_rope_fusion is not available".
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    check = TransformerConfig.__post_init__

    @functools.wraps(check)
    def configure_then_check(self: Any) -> None:
        configure_for_cpu(self)
        check(self)

    TransformerConfig.__post_init__ = configure_then_check


def accept_cpu_parameters() -> None:
    """Make gradient clipping, and the optimizers that keep float32 masters, recognise CPU tensors.

    Clipping and optimizers distinguish bfloat16 from float32 by type names. Without this patch, clipping raises an
    AssertionError, and the optimizers raise the TypeError "Wrapped parameters must be one of torch.cuda.FloatTensor".
    """
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    clip = with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = clip
    for cls in (optimizer.Float16OptimizerWithFloat16Params, DistributedOptimizer):
        cls.__init__ = with_cuda_type_names(cls.__init__)


def use_fused_adam() -> None:
    """Give Megatron an Adam with the interface of Apex's Adam, computed by torch's fused CPU kernel.

    Without this patch Megatron falls back to `torch.optim.AdamW`, and its distributed optimizer can then neither save
    nor resume (see `FusedCpuAdam`).
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from nemo_upcycle.cpu.adam import FusedCpuAdam

    optimizer.Adam = distrib_optimizer.Adam = FusedCpuAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def load_float32_shards() -> None:
    """Let the distributed optimizer load the state of float32 parameters, which are their own masters.

    Without this patch torch raises the RuntimeError "a view of a leaf Variable that requires grad is being used in an
    in-place operation". The same error occurs on a GPU, but nobody trains in pure float32 on a GPU.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(load)


def track_random_states() -> None:
    """Keep Megatron's named random states as states of the CPU generator, seeded as on a GPU.

    Without this patch dropout in tensor-parallel regions finds no state. The CPU's default generator replaces the
    GPU's default generator: each has the same state on all tensor-parallel ranks.
    """
    from megatron.core.tensor_parallel import random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    random.CudaRNGStatesTracker = CpuRNGStatesTracker
    # Activation recomputation saves and restores random states with these two functions.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


class NormAroundZero(torch.nn.RMSNorm):
    """A norm that stores its weight as the distance from one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised rows."""
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


def mark_norms_sequence_parallel() -> None:
    """Let torch's norms work under sequence parallelism, and mark them so that Megatron sums their gradients.

    Without this patch the local layer spec refuses: "sequence parallel not supported by torch LayerNorm". The spec
    also refuses norms around zero, which Gemma uses.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make = WrappedTorchNorm.__new__

    @functools.wraps(make)
    def make_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = unsharded.layernorm_zero_centered_gamma = False
        norm = make(cls, unsharded, *args, **kwargs)
        if config.layernorm_zero_centered_gamma:
            norm.__class__ = NormAroundZero
            torch.nn.init.zeros_(norm.weight)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = make_marked


def compute_without_transformer_engine() -> None:
    """Let torch multiply in the MoE router, normalise after the last layer, and measure and scale gradients.

    Without this patch Megatron raises the NameError "te_general_gemm is not defined", because the code compares this
    name with None but nothing defines the name. If Transformer Engine is installed, as Megatron-Bridge requires, all
    these steps call Transformer Engine, which needs CUDA tensors.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.transformer import torch_norm, transformer_block
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    transformer_block.LayerNormImpl = torch_norm.WrappedTorchNorm
    if find_spec("megatron.core.models.hybrid"):  # only in later releases
        from megatron.core.models.hybrid import hybrid_block

        hybrid_block.TENorm = torch_norm.WrappedTorchNorm
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None


def hand_over_split_sizes() -> None:
    """Give the all-to-all dispatcher its split sizes as numpy arrays.

    Without this patch the sizes stay tensors, because only CUDA tensors are converted, and `all_to_all_single` refuses
    tensors.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = on_cpu


def gather_uneven_rows() -> None:
    """Gather and reduce-scatter different numbers of rows per rank, by padding them to the largest number.

    Without this patch an MoE layer under tensor and expert parallelism fails as soon as its ranks hold different
    numbers of tokens. Unlike NCCL, gloo needs equal sizes.
    """
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(rows: torch.Tensor, length: int) -> torch.Tensor:
        return torch.nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, length - len(rows)])

    def gather_rows(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        length = max(1, *output_split_sizes)
        parts = gather(padded(input_, length), group).split(length)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter_rows(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, None, use_global_buffer)
        length = max(1, *input_split_sizes)
        parts = [padded(part, length) for part in input_.split(list(input_split_sizes))]
        return scatter(torch.cat(parts), group)[: input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_rows, scatter_rows


def keep_packed_sequences_apart() -> None:
    """Let the local attention accept packs of sequences, with a mask that keeps the sequences apart.

    Without this patch tuning on packs fails: "Packed sequence is not supported by DotProductAttention". Transformer
    Engine's kernels read the sequences' borders themselves.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    attend = DotProductAttention.forward

    @functools.wraps(attend)
    def attend_apart(self: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        packed = kwargs.pop("packed_seq_params", None)
        if packed is None:
            return attend(self, query, key, value, mask, *args, **kwargs)
        padded = packed.cu_seqlens_q_padded
        mask = packed_mask(packed.cu_seqlens_q if padded is None else padded, len(query))
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))  # add a batch dimension of size 1
        return attend(self, query, key, value, mask, *args, **kwargs)

    DotProductAttention.forward = attend_apart


def packed_mask(borders: torch.Tensor, length: int) -> torch.Tensor:
    """Return the attention mask of a pack, [1, 1, S, S]: True where a token must not attend.

    A token must not attend to later tokens, nor to other sequences.

    Args:
        borders: places where the sequences begin, and the end of the last sequence.
        length: length S of the pack (tokens).

    Example:
        >>> (~packed_mask(torch.tensor([0, 2, 3]), 3)).int().tolist()
        [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    places = torch.arange(length)
    sequence = torch.searchsorted(borders[1:].contiguous().long(), places, right=True)
    apart = sequence[:, None] != sequence[None, :]
    return (apart | (places[:, None] < places[None, :]))[None, None]


def compute_delta_nets_with_torch() -> None:
    """Compute gated delta nets with torch, as Megatron itself does in its deterministic mode.

    Without this patch, gated delta nets call kernels of flash-linear-attention. These kernels are written in Triton
    and need a GPU.
    """
    if not find_spec("megatron.core.ssm.gated_delta_net") or not find_spec("fla"):
        return
    from megatron.core.ssm.gated_delta_net import common, gdn, torch_chunk_gated_delta_rule

    def normalised(rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + 1e-6)

    def convolve(x: torch.Tensor, weight: torch.Tensor, bias: Any, **options: Any) -> tuple[torch.Tensor, None]:
        length, width = x.shape[1], weight.shape[-1]
        padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
        seen = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight))
        return torch.nn.functional.silu(seen[..., :length]).transpose(1, 2), None

    common.l2norm, gdn.causal_conv1d = normalised, convolve
    gdn.chunk_gated_delta_rule = torch_chunk_gated_delta_rule


def compile_nothing() -> None:
    """Run eagerly the functions that Megatron decorates with `torch.compile`.

    Without this patch the fused SwiGLU fails on a machine without a C++ compiler, which `torch.compile` needs on a
    CPU. (The fused SwiGLU keeps one input for the backward pass, and the plain SwiGLU keeps four tensors. On 512
    tokens of the demo's model, the fused SwiGLU saves 0.4 GB.)
    """
    torch.compiler.set_stance("force_eager")


def pad_tokens_of_experts() -> None:
    """Pad an expert's tokens with zeros, so that the padded number has few possible values (eight per power of two).

    Without this patch oneDNN compiles its bfloat16 products anew for nearly every number of tokens. An expert's number
    of tokens changes at every step, so the memory of each demo rank grows by 0.3 GiB in three steps.
    """
    from megatron.core.transformer.mlp import MLP

    compute = MLP.forward

    @functools.wraps(compute)
    def compute_padded(
        self: Any, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **others: Any
    ) -> Any:
        tokens = len(hidden_states)
        more = _next_size(tokens) - tokens
        if per_token_scale is None or not more or self.config.fp8:  # Megatron pads for FP8 itself
            return compute(self, hidden_states, per_token_scale, **others)
        padded = torch.nn.functional.pad(hidden_states, [0, 0, 0, more])
        output, bias = compute(self, padded, torch.nn.functional.pad(per_token_scale, [0, more]), **others)
        return output[:tokens], bias

    MLP.forward = compute_padded


def _next_size(tokens: int) -> int:
    """Return the next whole number that has at most four significant binary digits."""
    unit = 1 << max(0, tokens.bit_length() - 4)
    return -(-tokens // unit) * unit


def communicate_in_place() -> None:
    """Let the distributed optimizer sum its gradients and hand out its parameters within their own buffers.

    Without this patch every step copies both buffers (4 and 2 bytes per parameter). The reason is that gloo's
    reduce-scatter is an all-reduce of a copy, and gloo's all-gather fills a copy. This happens even if a group has
    only one rank, as for experts with EP2 on two ranks. Megatron's shards are slices of the buffers. So an
    all-reduce replaces the first operation, and a broadcast by each owner replaces the second one.
    """
    from megatron.core.distributed import param_and_grad_buffer

    def all_reduce(output: torch.Tensor, input: torch.Tensor, op: Any, group: Any, async_op: bool = False) -> None:
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = op
        group.allreduce([input], options).wait()  # torch.distributed.all_reduce would be coalesced, which makes a copy

    def all_gather(output: torch.Tensor, input: torch.Tensor, group: Any, async_op: bool = False) -> None:
        for owner, shard in enumerate(output.chunk(group.size())):
            torch.distributed.broadcast(shard, group=group, group_src=owner)

    param_and_grad_buffer.dist_reduce_scatter_func = all_reduce
    param_and_grad_buffer.dist_all_gather_func = all_gather


PATCHES: tuple[Callable[[], None], ...] = (
    adapt_every_config,
    place_tensors_on_cpu,
    accept_cpu_parameters,
    use_fused_adam,
    load_float32_shards,
    track_random_states,
    mark_norms_sequence_parallel,
    compute_without_transformer_engine,
    hand_over_split_sizes,
    gather_uneven_rows,
    keep_packed_sequences_apart,
    compute_delta_nets_with_torch,
    compile_nothing,
    pad_tokens_of_experts,
    communicate_in_place,
    write_checkpoints_without_threads,
    copy_views_as_they_are_written,
    emulate_fp8,
)
