"""Parameters that real Transformer Engine modules keep in FP8 and FP4 are filled, and master weights are exact.

Modules, tensors, quantizers, Megatron's wrapper and its distributed optimizer are real. Only the quantizing kernels
are replaced, by `tests/te/quantizing.py`. `tests/gpu/test_quantized.py` tests the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from nemo_upcycle.cpu.device import with_cuda_type_names
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.online.quantized import is_quantized, kept_values
from nemo_upcycle.planning.layout import Layout
from tests.models import MemorySource, small_architecture
from tests.te.quantizing import MOST, OnCpu, buffer_of, cast, dequantize, quantize
from tests.te.test_upcycle import ONE_RANK, _local, _with_te


ARCH = small_architecture(num_layers=2, ffn_size=128)  # MXFP8 needs multiples of 32 on every rank
CLASSES = {
    "delayed": "Float8Tensor",
    "tensorwise": "Float8Tensor",
    "blockwise": "Float8BlockwiseQTensor",
    "mxfp8": "MXFP8Tensor",
    "nvfp4": "NVFP4Tensor",
}
RECIPES = pytest.mark.parametrize("recipe", CLASSES)
SPECS = {
    "copy": UpcycleSpec(num_experts=4, top_k=2),
    "noise": UpcycleSpec(num_experts=4, top_k=2, method="noise", noise_std=0.1),
    "granular": UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1),
}


@pytest.fixture(autouse=True)
def _quantized_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import transformer_engine_torch

    monkeypatch.setattr(transformer_engine_torch, "quantize", quantize)
    monkeypatch.setattr(transformer_engine_torch, "dequantize", dequantize)
    with OnCpu():
        yield


def keeps_values(recipe: str) -> bool:
    """Return whether the values before quantization are kept; FP4 with Megatron-Core 0.15 does not keep them."""
    return recipe != "nvfp4" or not version("megatron-core").startswith("0.15.")


def build(
    spec: UpcycleSpec, layout: Layout, recipe: str | None = None, *, grouped: bool = True, **changes: Any
) -> list[Any]:
    """Return a rank's chunks in BF16, or, if a recipe is given, with parameters in the recipe's FP8 or FP4."""
    low = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_param": True} if recipe else {}
    if recipe == "nvfp4":
        low = {"fp4": "e2m1", "fp4_recipe": "nvfp4", "fp4_param": True}
    return _with_te(
        _local(ARCH, spec, layout), moe_grouped_gemm=grouped, bf16=True, params_dtype=torch.bfloat16, **low, **changes
    )


def parameters_of(chunks: list[Any]) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of chunks by chunk number and name."""
    return {f"{number}.{name}": each for number, chunk in enumerate(chunks) for name, each in chunk.named_parameters()}


def exact_values(spec: UpcycleSpec, layout: Layout, **options: Any) -> dict[str, torch.Tensor]:
    """Return the parameter values of the same chunks in BF16."""
    chunks = build(spec, layout, **options)
    upcycle_into(chunks, MemorySource(ARCH), spec)
    return {name: parameter.detach() for name, parameter in parameters_of(chunks).items()}


def _scale(parameter: Any) -> float:
    return float(1 / parameter._scale_inv) if hasattr(parameter, "_scale_inv") else 1.0


@RECIPES
@pytest.mark.parametrize("grouped", [True, False], ids=["TEGroupedMLP", "SequentialMLP"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_parameter_is_quantized_from_what_it_is_in_bf16(recipe: str, spec: UpcycleSpec, grouped: bool) -> None:
    layout = Layout(gpus=4, tp=2, ep=2)
    for rank in range(layout.gpus):
        with megatron_rank(layout, rank):
            wanted = exact_values(spec, layout, grouped=grouped)
            chunks = build(spec, layout, recipe, grouped=grouped)
            receipt = upcycle_into(chunks, MemorySource(ARCH), spec)
        parameters = parameters_of(chunks)
        assert parameters.keys() == wanted.keys()
        low = {name for name, parameter in parameters.items() if is_quantized(parameter)}
        assert low == {name for name in wanted if ".linear_" in name and "norm" not in name}
        for name, parameter in parameters.items():
            if name not in low:
                assert torch.equal(parameter, wanted[name]), name
                continue
            buffer = buffer_of(parameter)
            assert torch.equal(buffer.flatten(), cast(wanted[name], _scale(parameter))[: buffer.numel()]), name
            if keeps_values(recipe):
                assert torch.equal(kept_values(parameter), wanted[name]), name
        records = {record.name: record.dtype for record in receipt.parameters}
        assert {records[name.partition(".")[2]] for name in low} == {CLASSES[recipe]}
        assert receipt.exact_masters is keeps_values(recipe)


def test_delayed_scaling_starts_from_the_values_that_were_filled_in() -> None:
    spec = SPECS["copy"]
    with megatron_rank(ONE_RANK, 0):
        wanted, chunks = exact_values(spec, ONE_RANK), build(spec, ONE_RANK, "delayed")
        for parameter in filter(is_quantized, parameters_of(chunks).values()):
            parameter._quantizer.amax.fill_(1e30)  # as in memory that was never written
        upcycle_into(chunks, MemorySource(ARCH), spec)
    for name, parameter in parameters_of(chunks).items():
        if not is_quantized(parameter):
            continue
        largest = wanted[name].abs().max()
        assert parameter._quantizer.amax == largest
        assert parameter._quantizer.scale * largest == pytest.approx(MOST)
        difference = (parameter.dequantize() - wanted[name]).abs()
        assert (difference <= wanted[name].abs() / 16 + largest / MOST / 2**9).all(), name


def optimizer_of(chunks: list[Any], recipe: str) -> Any:
    """Return Megatron's distributed optimizer for wrapped chunks."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    fp8 = None if recipe == "nvfp4" else recipe
    options = OptimizerConfig(optimizer="adam", lr=1e-4, bf16=True, use_distributed_optimizer=True, fp8_recipe=fp8)
    return with_cuda_type_names(get_megatron_optimizer)(options, chunks, use_gloo_process_groups=False)


def wrapped_in_ddp(chunks: list[Any], recipe: str) -> list[Any]:
    """Return chunks in Megatron's data-parallel wrapper, with their parameters in the wrapper's buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        fp8_param_gather=recipe != "nvfp4",
        reuse_grad_buf_for_mxfp8_param_ag=recipe == "mxfp8",
    )
    return [DistributedDataParallel(chunk.config, options, chunk) for chunk in chunks]


def check_masters(optimizer: Any, chunks: list[Any], wanted: dict[str, torch.Tensor]) -> None:
    """Check that every master weight equals its own part of the wanted values."""
    names = {id(parameter): name for name, parameter in parameters_of(chunks).items()}
    seen = 0
    for part in optimizer.chained_optimizers:
        groups = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        for parameter, master in (pair for group in groups for pair in zip(*group, strict=True)):
            cut = part._get_model_param_range_map(parameter)["param"]
            values = wanted[names[id(parameter)]].float().flatten()
            assert torch.equal(master, values[cut.start : cut.end])
            seen += is_quantized(parameter)
    assert seen


@RECIPES
@pytest.mark.parametrize("order", ["fill, wrap: Bridge", "wrap, fill: NeMo"])
def test_master_weights_are_the_dense_values(recipe: str, order: str) -> None:
    if not keeps_values(recipe):
        pytest.skip("Megatron-Core 0.15 keeps no values before FP4")
    spec, layout = SPECS["copy"], Layout(gpus=2, ep=2)
    for rank in range(layout.gpus):
        with megatron_rank(layout, rank):
            wanted, chunks = exact_values(spec, layout), build(spec, layout, recipe)
            if order == "fill, wrap: Bridge":
                upcycle_into(chunks, MemorySource(ARCH), spec)
                wrapped = wrapped_in_ddp(chunks, recipe)
            else:
                wrapped = wrapped_in_ddp(chunks, recipe)
                upcycle_into(wrapped, MemorySource(ARCH), spec)
            check_masters(optimizer_of(wrapped, recipe), chunks, wanted)
            again = upcycle_into(wrapped, MemorySource(ARCH), spec)
        assert not again.exact_masters  # the optimizer has used up the kept values for its master weights


def test_a_model_for_inference_keeps_no_values() -> None:
    spec = SPECS["copy"]
    with megatron_rank(ONE_RANK, 0):
        wanted = exact_values(spec, ONE_RANK)
        with torch.no_grad():
            chunks = build(spec, ONE_RANK, "tensorwise")
        receipt = upcycle_into(chunks, MemorySource(ARCH), spec)
    assert not receipt.exact_masters
    for name, parameter in filter(lambda item: is_quantized(item[1]), parameters_of(chunks).items()):
        assert kept_values(parameter) is None
        assert torch.equal(buffer_of(parameter).flatten(), cast(wanted[name], _scale(parameter)))
