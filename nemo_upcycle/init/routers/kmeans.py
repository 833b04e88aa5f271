"""Spherical k-means of what enters the MoE, a centre for each copy (arXiv 2604.13508)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_upcycle.init.routers import CalibratedInit, register


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.init.calibration import LayerSample

#: Rounds after which it ends, settled or not; and tokens of which the best becomes a first centre.
ROUNDS, TRIALS = 30, 8


@register
class KMeans(CalibratedInit):
    """A token goes to the copies whose centres point most nearly where its activation does."""

    name = "kmeans"

    def fit(self, sample: LayerSample) -> torch.Tensor:
        """Return the centres as unit vectors, [C, D] in float64; k-means++ chooses the first ones."""
        import torch
        from torch.nn.functional import normalize

        unit = list(sample.run(lambda batch_ND: normalize(batch_ND, dim=1), sample.batches))
        centres_CD = _first_centres(unit, sample)
        before: torch.Tensor | None = None
        for _ in range(ROUNDS):
            turned_DC = centres_CD.T.float().contiguous()

            def assigned(
                batch_ND: torch.Tensor, turned_DC: torch.Tensor = turned_DC
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                cosines_N, chosen_N = (batch_ND @ turned_DC).max(1)
                sums_CD = torch.zeros(sample.copies, batch_ND.shape[1], dtype=torch.float64)
                return chosen_N, cosines_N, sums_CD.index_add_(0, chosen_N, batch_ND.double())

            chosen, cosines, sums_CD = list[Any](), list[Any](), torch.zeros_like(centres_CD)
            for chosen_N, cosines_N, part_CD in sample.run(assigned, unit):
                chosen.append(chosen_N)
                cosines.append(cosines_N)
                sums_CD += part_CD
            chosen_T = torch.cat(chosen)
            if before is not None and torch.equal(chosen_T, before):
                break
            before, worst_T = chosen_T, torch.cat(cosines).sort(stable=True).indices
            for number, copy in enumerate((torch.bincount(chosen_T, minlength=sample.copies) == 0).nonzero()[:, 0]):
                sums_CD[copy] = _token(unit, int(worst_T[number]))  # it has no token: it gets one that fits nowhere
            centres_CD = normalize(sums_CD, dim=1)
        return centres_CD


def _first_centres(unit: list[torch.Tensor], sample: LayerSample) -> torch.Tensor:
    """Return tokens, each the best of some drawn with a probability that grows with its distance from those before."""
    import torch

    from nemo_upcycle.init.rng import uniform

    distance_T = torch.full((sum(map(len, unit)),), 2.0, dtype=torch.float64)  # all are as likely at first
    centres: list[torch.Tensor] = []
    for draws in uniform((sample.copies, TRIALS), [sample.generator])[0]:
        edges_T = distance_T.cumsum(0)
        places = torch.searchsorted(edges_T, draws * edges_T[-1], right=True).clamp_(max=len(edges_T) - 1)
        drawn = [_token(unit, int(place)) for place in places]
        turned_Dt = torch.stack(drawn, 1).float()
        cosines_Tt = torch.cat([*sample.run(turned_Dt.__rmatmul__, unit)])
        distances_Tt = torch.minimum(distance_T[:, None], (1.0 - cosines_Tt.double()).clamp_(min=0.0))
        best = int(distances_Tt.sum(0).argmin())
        centres.append(drawn[best])
        distance_T = distances_Tt[:, best]
    return torch.stack(centres)


def _token(unit: list[torch.Tensor], place: int) -> torch.Tensor:
    for batch_ND in unit:
        if place < len(batch_ND):
            return batch_ND[place].double()
        place -= len(batch_ND)
    raise IndexError(place)
