"""Step-0 equivalence: does the upcycled Megatron model compute what the dense parent computes?

Measured on real text, on one rank, before any training: the parent in Hugging Face's implementation, the parent in
Megatron, and the upcycled model in Megatron. The first pair crosses two implementations of the same model in float32.

The second isolates upcycling, and is measured in float64 as well: in float32 the combine weights, which sum to one
only up to rounding, disturb every layer by one unit in the last place, and thirty layers amplify that to what any
reordering of a sum costs the parent itself. That cost, the parent's float32 against its float64, stands beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.cpu.backend import configure_for_cpu, use_cpu_backend
from nemo_upcycle.models.hf_model import load_model
from nemo_upcycle.online.receipt import UpcycleReceipt
from nemo_upcycle.online.upcycle import load_dense_into, upcycle_into
from nemo_upcycle.sources import open_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.progress import ProgressLine
from nemo_upcycle.verify.logits import compare_logits


#: What rounding may make of logits: across implementations in float32; within one in float64, where Megatron still
#: computes the router's softmax in float32.
TOLERANCE = 2e-4
TOLERANCE_SAME_STACK = 2e-5


@contextmanager
def one_rank() -> Iterator[None]:
    """Set up torch.distributed and Megatron's groups for this process alone, where nobody has yet."""
    from megatron.core import parallel_state, tensor_parallel

    on_cpu = use_cpu_backend()
    if not torch.distributed.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_float32(config: Any, vocab_size: int) -> torch.nn.Module:
    """Return the Megatron model of a NeMo config, in float32 on one rank, its weights left uninitialised.

    Args:
        config: a NeMo `GPTConfig`, of any layout; it is not changed.
        vocab_size: V of the checkpoint; the model is built without padding.
    """
    config = copy.deepcopy(config)
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
        setattr(config, name, 1)
    config.virtual_pipeline_model_parallel_size = None
    config.context_parallel_size, config.sequence_parallel = 1, False
    config.expert_tensor_parallel_size = 1
    config.perform_initialization = False
    config.bf16 = config.fp16 = False
    config.fp8 = None
    config.params_dtype = config.autocast_dtype = config.pipeline_dtype = torch.float32
    config.vocab_size, config.should_pad_vocab = vocab_size, False
    config.moe_router_dtype = "fp64"  # follows the activations: no less than they have, in either precision
    configure_for_cpu(config)  # on a GPU too: Transformer Engine knows no float64
    model = config.configure_model(tokenizer=None)
    return model.eval() if not torch.cuda.is_available() else model.cuda().eval()


@torch.no_grad()
def megatron_logits(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return a Megatron model's logits [B, S, V] in the type of its weights, on the CPU."""
    device = next(model.parameters()).device
    length = tokens_BS.shape[1]
    positions_BS = torch.arange(length, device=device).expand_as(tokens_BS)
    masked = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
    return model(tokens_BS.to(device), positions_BS, masked).cpu()


@contextmanager
def _layer_outputs(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what every layer hands on, in order."""
    outputs: list[torch.Tensor] = []
    layers = cast("Any", model).decoder.layers
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[-1][0].detach())) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def hugging_face_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return the logits of a Hugging Face folder in float32, [B, S, V]."""
    return load_model(folder, dtype=torch.float32).eval()(tokens_BS).logits


def check_step0(
    moe_config: Any,
    dense_config: Any,
    dense_folder: Path,
    spec: UpcycleSpec,
    tokens_BS: torch.Tensor,
    step0_folder: Path,
) -> UpcycleReceipt:
    """Upcycle on one rank in float32, compare with the dense parent, and export the model of step 0.

    Args:
        moe_config: NeMo config of the upcycled model.
        dense_config: NeMo config of the parent.
        dense_folder: the parent's Hugging Face folder.
        spec: how to upcycle.
        tokens_BS: token ids of real text, [B, S].
        step0_folder: where to write the upcycled model of step 0, in float32, as a Hugging Face folder.

    Returns:
        The receipt, with `max_abs_logit_diff` (parent in Hugging Face against upcycled model in Megatron, float32),
        `max_abs_logit_diff_same_stack` (both in Megatron, float64; `..._float32` beside it), `parent_float32_rounding`
        (the parent in Megatron, float32 against float64), `layer_relative_diff` (both in Megatron, float64, after
        every layer: it shows where they part), and what is expected of them.
    """
    with one_rank(), open_dense(dense_folder) as dense, ProgressLine("check step 0", 4) as line:
        vocab = dense.architecture.vocab_size
        parent_BSV = hugging_face_logits(dense_folder, tokens_BS)
        line.advance(note="parent in Hugging Face")
        model = build_float32(dense_config, vocab)
        load_dense_into([model], dense)
        dense_run = _run(model, tokens_BS)
        del model
        line.advance(note="parent in Megatron")
        model = build_float32(moe_config, vocab)
        receipt = upcycle_into([model], dense, spec)
        arch = dense.architecture.upcycled(spec)
        export_weights(LiveWeights(model), arch, dense_folder, step0_folder, dtype=torch.float32)
        line.advance(note="export of step 0")
        receipt.equivalence = _equivalence(parent_BSV, dense_run, _run(model, tokens_BS), receipt.exact)
        line.advance(note="upcycled model in Megatron")
    receipt.layout = {"tensor": 1, "pipeline": 1, "expert": 1, "data": 1}
    return receipt


@dataclass(frozen=True)
class _Run:
    """One Megatron model's logits in float32 and float64, and what its layers handed on in float64."""

    single_BSV: torch.Tensor
    double_BSV: torch.Tensor
    layers: list[torch.Tensor]


def _run(model: torch.nn.Module, tokens_BS: torch.Tensor) -> _Run:
    """Run a model in both precisions; afterwards its weights are float64."""
    single_BSV = megatron_logits(model, tokens_BS)
    with _layer_outputs(model.double()) as layers:
        return _Run(single_BSV, megatron_logits(model, tokens_BS), layers)


def _equivalence(parent_BSV: torch.Tensor, dense: _Run, moe: _Run, exact: bool) -> dict[str, Any]:
    across = compare_logits(parent_BSV, moe.single_BSV)
    within = compare_logits(dense.double_BSV, moe.double_BSV, dense.layers, moe.layers)
    return {
        "max_abs_logit_diff": across.max_abs,
        "max_abs_logit_diff_same_stack": within.max_abs,
        "max_abs_logit_diff_same_stack_float32": compare_logits(dense.single_BSV, moe.single_BSV).max_abs,
        "parent_float32_rounding": compare_logits(dense.single_BSV.double(), dense.double_BSV).max_abs,
        "mean_abs_logit_diff": across.mean_abs,
        "same_argmax": across.same_argmax,
        "max_abs_logit": float(parent_BSV.abs().max()),
        "layer_relative_diff": list(within.layer_relative),
        "tokens_compared": across.tokens,
        "tolerance": TOLERANCE if exact else None,
        "tolerance_same_stack": TOLERANCE_SAME_STACK if exact else None,
        "within_tolerance": across.max_abs <= TOLERANCE and within.max_abs <= TOLERANCE_SAME_STACK,
    }
