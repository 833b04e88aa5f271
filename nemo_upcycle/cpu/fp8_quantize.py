"""Quantise matrices to 8-bit numbers with a scale per block, bit-identical to Transformer Engine's kernels.

The code follows Transformer Engine at commit d0067d0d: `common/recipe/recipe_common.cuh` for the scale of a tensor or
a block, and `common/util/ptx_arch_spec.cuh` for the exponents of MXFP8. CUDA's saturating conversions round to the
nearest number, and they round ties to even.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Quantized(NamedTuple):
    """A matrix in FP8.

    Attributes:
        data: FP8 numbers in E4M3 or E5M2, [R, C].
        scale_inv: factor on the numbers of each block, float32 [blocks of rows, blocks of columns].
        block: rows and columns of a block; the last blocks may be smaller.
    """

    data: torch.Tensor
    scale_inv: torch.Tensor
    block: tuple[int, int]

    def values(self) -> torch.Tensor:
        """Compute the numbers that the matrix stands for, float32 [R, C]."""
        tiles = _tiles(self.data.float(), self.block) * self.scale_inv[:, None, :, None]
        return _untile(tiles, self.data.shape)


def quantize(
    x_RC: torch.Tensor,
    dtype: torch.dtype,
    block: tuple[int, int],
    *,
    scale: torch.Tensor | None = None,
    power_of_two: bool = False,
    e8m0: bool = False,
) -> Quantized:
    """Quantise a matrix: multiply every number by its block's scale, saturate, and round to the nearest FP8 number.

    Args:
        x_RC: the matrix, [R, C].
        dtype: E4M3 or E5M2.
        block: rows and columns of a block.
        scale: one scale for all blocks; None: the scale of each block follows from the block's largest number.
        power_of_two: whether scales are rounded down to a power of two.
        e8m0: whether scales are powers of two kept in 8 bits, as in MXFP8.
    """
    largest = torch.finfo(dtype).max
    tiles = _tiles(x_RC.float(), block)
    if scale is not None:
        scales = scale.float().expand(tiles.shape[0], tiles.shape[2])
        inverse = scales.reciprocal()
    elif e8m0:
        scales, inverse = _e8m0_scales(tiles.abs().amax((1, 3)), largest)
    else:
        scales = _scales(tiles.abs().amax((1, 3)), largest, torch.finfo(x_RC.dtype).max, power_of_two)
        inverse = scales.reciprocal()
    data = (tiles * scales[:, None, :, None]).clamp_(-largest, largest).to(dtype)
    return Quantized(_untile(data, x_RC.shape), inverse, block)


def _scales(amax: torch.Tensor, largest: float, highest: float, power_of_two: bool) -> torch.Tensor:
    """Compute the scales that map `amax` to the largest FP8 number; 1 if `amax` is zero or not finite."""
    scales = torch.div(largest, amax)  # `largest / amax` would multiply by a reciprocal, which rounds once more
    scales = torch.where(scales.isinf(), highest, scales)
    if power_of_two:
        scales = (scales.view(torch.int32) & -(1 << 23)).view(torch.float32)  # keep only sign and exponent
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scales)


def _e8m0_scales(amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return MXFP8's scales and their inverses 2^e, with the lowest e at which nothing saturates."""
    bits = (amax * torch.tensor(1 / largest)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & ((1 << 23) - 1)
    is_tiny = (exponent == 0) & (mantissa <= 1 << 22)  # at most 2^-127, which exponent 0 stands for
    exponent = exponent + ((mantissa > 0) & ~is_tiny)
    exponent = torch.where(amax.isinf(), 254, exponent)
    return _power_of_two(254 - exponent), _power_of_two(exponent)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^(exponent - 127); `torch.pow` and `torch.ldexp` need not be exact."""
    return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)


def _tiles(x_RC: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return a matrix as [blocks of rows, rows, blocks of columns, columns], padded with zeros."""
    rows, columns = block
    over = 0, -x_RC.shape[1] % columns, 0, -x_RC.shape[0] % rows
    x_RC = torch.nn.functional.pad(x_RC, over) if any(over) else x_RC
    return x_RC.reshape(x_RC.shape[0] // rows, rows, x_RC.shape[1] // columns, columns)


def _untile(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    padded = tiles.reshape(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3])
    return padded[: shape[0], : shape[1]].contiguous()
