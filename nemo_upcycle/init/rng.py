"""Random numbers that depend on what they are for, never on who draws them.

Every block of numbers has a name (seed, layer, tensor, expert). The name is hashed into the seed of a generator of
its own, so any rank of any parallel layout draws the same bits for the same block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch


def block_generator(seed: int, *name: object) -> torch.Generator:
    """Return the generator of the block called `name`.

    Example:
        >>> a, b = block_generator(1, "router", 3, 0), block_generator(1, "router", 3, 0)
        >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
        True
    """
    text = "/".join(str(part) for part in (seed, *name))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return float64 numbers between 0 and 1, of one block for each generator: `[len(generators), *shape]`."""
    drawn = torch.empty((len(generators), *shape), dtype=torch.float64)
    for block, generator in zip(drawn, generators, strict=True):
        torch.rand(shape, generator=generator, out=block)
    return drawn


def normal(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return standard normal numbers in float64, of one block for each generator.

    Their shape is `[len(generators), *shape]`.

    Box-Muller in float64 on the generator's uniform numbers: `torch.randn` takes other code paths, with other last
    bits, on processors with other vector units. Logarithm, root and cosine may still differ there in the last bit of
    float64. Rounding hides that, unless it falls between two neighbours: float32 keeps 24 of 53 bits, bfloat16 8, so
    one such difference in 2^29 shows in float32, and one in 2^45 in bfloat16. Among billions of float32 numbers a few
    may thus differ between processors; on one kind of processor all bits are the same.
    """
    drawn = uniform((2, *shape), generators)
    return torch.sqrt(-2.0 * torch.log1p(-drawn[:, 0])) * torch.cos(2.0 * math.pi * drawn[:, 1])
