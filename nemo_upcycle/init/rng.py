"""Random numbers that depend on their purpose, never on the rank that draws them.

Every block of numbers has a name (seed, layer, tensor, expert). A hash of the name seeds the block's own generator, so
every rank of every parallel layout draws the same bits for the same block.
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
    """Draw float64 numbers between 0 and 1, one block per generator: `[len(generators), *shape]`."""
    drawn = torch.empty((len(generators), *shape), dtype=torch.float64)
    for block, generator in zip(drawn, generators, strict=True):
        torch.rand(shape, generator=generator, out=block)
    return drawn


def normal(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw standard normal numbers in float64, one block per generator: `[len(generators), *shape]`.

    This is Box-Muller in float64 on the generator's uniform numbers. `torch.randn` is not used, because its code
    paths, and with them the last bits, differ between processors with different vector units. The logarithm, root and
    cosine may still differ between processors in the last bit of float64. Rounding to the model's type hides such a
    difference unless the number lies on a rounding boundary. float32 keeps 24 of 53 bits, so one of 2^29 differences
    shows in float32. bfloat16 keeps 8 bits, so one of 2^45 differences shows in bfloat16. Among billions of float32
    numbers, a few may therefore differ between kinds of processor. On one kind of processor all bits are the same.
    """
    drawn = uniform((2, *shape), generators)
    return torch.sqrt(-2.0 * torch.log1p(-drawn[:, 0])) * torch.cos(2.0 * math.pi * drawn[:, 1])
