"""Sigmoid scores, as in DeepSeek-V3 (arXiv 2412.19437) and GLM-4.5: the chosen scores are divided by their sum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nemo_upcycle.init.routers import RouterKind, register
from nemo_upcycle.spec import FLOAT32


if TYPE_CHECKING:
    import torch

    from nemo_upcycle.spec import UpcycleSpec


@register
class Sigmoid(RouterKind):
    """Sigmoid scores. The model is exact with two or more experts per token.

    With one expert per token, the score is not divided by the sum, so the weight is not 1.
    """

    score, order = "sigmoid", "topk_softmax"
    pre_softmax = False
    in_float32 = True
    least_logit = math.log(1e-20 / FLOAT32)  # Megatron and transformers add 1e-20 to the sum

    def weight_sum(self, spec: UpcycleSpec) -> float:
        """Return 1, or the sigmoid of zero if one expert is chosen."""
        return 1.0 if spec.top_k > 1 else 0.5

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid of every logit."""
        return logits_TE.sigmoid()

    def spacing(self, logit: float) -> float:
        """Return the spacing of logits, see `RouterKind.spacing`.

        The slope of log sigmoid is 1 / (1 + exp(logit)), so all logits from 17 on have a score of 1 in float32.
        """
        return FLOAT32 * (1.0 + math.exp(min(logit, 100.0)))
