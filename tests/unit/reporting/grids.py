"""Evidence as a grid of ten arms leaves it: three seeds, two lengths, a learning rate that stays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


STEP_TOKENS = 8192
EVERY = 31
#: Arm -> steps, bits per byte at step 0 and after 186 steps, FLOPs of a token.
ARMS: dict[str, tuple[int, float, float, float]] = {
    "dense": (372, 2.029, 2.024, 1.00),
    "moe": (372, 2.029, 2.009, 1.42),
    "st": (186, 2.563, 2.021, 1.42),
    "st_scaled": (186, 2.037, 2.010, 1.42),
    "capacity_1": (186, 2.029, 2.011, 1.42),
    "capacity_2": (186, 2.029, 2.009, 1.42),
    "capacity_4": (186, 2.029, 2.009, 1.42),
    "noise": (186, 2.029, 2.009, 1.42),
    "drop": (186, 2.461, 2.061, 1.42),
    "granular_shared": (186, 2.029, 2.020, 1.63),
}


def laptop_evidence() -> dict[str, Any]:
    """Return evidence like that of the laptop grid, with 40 documents."""
    random = np.random.default_rng(1)
    names = [f"{source}/{number}" for source in ("gcide", "linux", "speeches", "wordnet") for number in range(10)]
    sizes = [200 + 10 * number for number in range(40)]
    cells, described = {}, {}
    for arm, (steps, start, middle, flops) in ARMS.items():
        for seed in (1, 2, 3):
            shift = 0.002 * (seed - 2)
            own = random.normal(0, 0.0005)
            scores = []
            for step in range(0, steps + 1, EVERY):
                done = math.log2(1 + step / 20) / math.log2(1 + 186 / 20)
                bits = start + (middle - start) * (1 - math.exp(-3 * done)) / (1 - math.exp(-3))
                bits += (shift + own) * (step > 0)
                nats = [
                    -size * math.log(2) * (bits + random.normal(0, 0.001) + 0.5 * math.sin(number))
                    for number, size in enumerate(sizes)
                ]
                scores.append({"step": step, "nats": nats})
            cells[f"{arm}-seed{seed}"] = {
                "flops_per_token": 6.3e6 * flops,
                "ranks": 1,
                "scores": scores,
                "tokens": [STEP_TOKENS * steps],
                "seconds": [1.0],
                "routers": {},
            }
            described[f"{arm}-seed{seed}"] = {
                "arm": arm,
                "seed": seed,
                "steps": steps,
                "tokens_per_step": STEP_TOKENS,
                "schedule": "lr=0.0006, constant",
                "is_rate_constant": True,
            }
    return {
        "grid": "laptop",
        "documents": {"names": names, "bytes": sizes},
        "cells": cells,
        "described": {
            "about": "ten arms",
            "arms": {arm: f"about {arm}" for arm in ARMS},
            "cells": described,
            "references": {arm: "dense" if arm == "moe" else "moe" for arm in ARMS if arm != "dense"},
            "margin": 0.002,
        },
    }


#: Tokens of the parents, and of what is trained after them; steps of 8,192.
PARENTS, AFTER = (305, 610, 1221, 2441), (153, 305, 610)


def parents_evidence() -> dict[str, Any]:
    """Return evidence of parents with four budgets: what upcycling gains halves when a parent's tokens double."""
    names, sizes = [f"law/{number}" for number in range(20)], [200 + 10 * number for number in range(20)]
    cells, described = {}, {}

    def nats_of(bits: float, seed: int) -> list[float]:
        return [-size * math.log(2) * (bits + 0.002 * seed + 0.001 * (n % 3 - 1)) for n, size in enumerate(sizes)]

    def parent_bits(steps: int) -> float:
        return 3.0 - 0.1 * math.log2(steps / 305)

    def train(arm: str, steps: int, seed: int, before: int, bits: float) -> None:
        is_moe, cell = arm.startswith("moe"), f"{arm}-{steps}-seed{seed}"
        starts, ends = nats_of(parent_bits(before) if before else 4.0, seed), nats_of(bits, seed)
        cells[cell] = {
            "flops_per_token": 2.0e6 if is_moe else 1.0e6,
            "ranks": 1,
            "scores": [{"step": 0, "nats": starts}, {"step": steps, "nats": ends}],
            "tokens": [STEP_TOKENS * step for step in range(1, 41)],
            "seconds": [(3.0 if is_moe else 1.0) * (1 + step % 10) for step in range(1, 41)],
            "routers": {},
        }
        described[cell] = {
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "tokens_per_step": STEP_TOKENS,
            "schedule": "lr=0.006, cosine",
            "is_rate_constant": False,
            "parent": f"dense_from_nothing-{before}" if before else "untrained",
            "parent_tokens": before * STEP_TOKENS,
            "is_length": True,
            "experts": 8 if is_moe else 1,
            "topk": 2 if is_moe else 1,
            "granularity": 1,
            "active_parameters": 300 if is_moe else 200,
            "total_parameters": 800 if is_moe else 200,
        }

    for seed in (1, 2):
        for steps in PARENTS:
            train("dense_from_nothing", steps, seed, 0, parent_bits(steps))
            train("moe_from_nothing", steps, seed, 0, 2.95 - 0.12 * math.log2(steps / 305))
            for after in AFTER:
                dense = parent_bits(steps + after)
                train(f"dense_{steps}", after, seed, steps, dense)
                train(f"moe_{steps}", after, seed, steps, dense - 0.08 * 305 / steps)
    arms = list(dict.fromkeys(cell["arm"] for cell in described.values()))
    return {
        "grid": "budget",
        "documents": {"names": names, "bytes": sizes},
        "heldout": {"tokens": 1000, "bytes": 2500},
        "cells": cells,
        "described": {
            "about": "parents",
            "arms": dict.fromkeys(arms, "an arm"),
            "cells": described,
            "references": {f"moe_{steps}": f"dense_{steps}" for steps in PARENTS},
            "margin": 0.002,
        },
    }
