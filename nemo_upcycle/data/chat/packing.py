"""Pack sequences of different lengths into packs of one length, in the format of NeMo and Megatron-Bridge.

NeMo and Megatron-Bridge read a `.npy` file of dicts with `input_ids`, `loss_mask` (shifted by one place, like the
labels) and `seq_start_id`. A sequence of n tokens takes n - 1 places, because its last token is only a label.
Attention does not cross sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_upcycle.data.chat.template import Tokens


def pack(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Assign sequences to packs: the longest first, each to the fullest pack that still has room for it.

    Args:
        lengths: places that each sequence takes, at most `size`.
        size: places in a pack.
        seed: random seed for the order of the packs, and for the choice among equally long sequences.

    Returns:
        For each pack, the numbers of its sequences.

    Example:
        >>> sorted(map(sorted, pack([5, 3, 2, 4], 7, seed=0)))
        [[0, 2], [1, 3]]
    """
    numbers = np.random.default_rng(seed).permutation(len(lengths))
    packs: list[list[int]] = []
    # Packs are grouped by their number of free places, and bit r of `rooms` tells whether a pack with r free places
    # exists. So the fullest pack with enough free places is found at once. A search through all packs would take a day
    # for a million sequences.
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0
    for number in sorted(map(int, numbers), key=lambda number: -lengths[number]):
        length = lengths[number]
        suffice = rooms >> length
        if suffice:
            room = length + (suffice & -suffice).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = size, len(packs)
            packs.append([])
        packs[chosen].append(number)
        with_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    order = np.random.default_rng(seed + 1).permutation(len(packs))
    return [packs[place] for place in order]


def write_packs(path: Path, sequences: Sequence[Tokens], size: int, seed: int) -> dict[str, Any]:
    """Write sequences as packs of `size` places.

    Args:
        path: the `.npy` file to write.
        sequences: sequences of at most `size` + 1 tokens.
        size: places in a pack.
        seed: seed of the packing, see `pack`.

    Returns:
        The entry for these packs in NeMo's metadata.
    """
    lengths = [len(sequence.ids) - 1 for sequence in sequences]
    packs = pack(lengths, size, seed)
    rows = np.empty(len(packs), dtype=object)
    for place, numbers in enumerate(packs):
        rows[place] = _row([sequences[number] for number in numbers])
    np.save(path, rows, allow_pickle=True)
    used = [sum(lengths[number] for number in numbers) for numbers in packs]
    return {
        "packs": len(packs),
        "dataset_max_seqlen": max(lengths),
        "max_samples_per_bin": max(map(len, packs)),
        "packing_factor": round(len(lengths) / len(packs), 2),
        "packing_efficiency": round(100 * sum(used) / len(packs) / size, 2),
        "pack_size": size,
        "min_packed_seqlen": min(used),
    }


def _row(sequences: Sequence[Tokens]) -> dict[str, Any]:
    starts = np.cumsum([0, *(len(sequence.ids) for sequence in sequences)])[:-1]
    ahead = [np.append(sequence.is_answer[1:], False) for sequence in sequences]
    return {
        "input_ids": np.concatenate([sequence.ids for sequence in sequences]),
        "loss_mask": np.concatenate(ahead).astype(np.uint8),
        "seq_start_id": starts.tolist(),
    }
