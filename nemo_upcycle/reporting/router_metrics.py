"""The router metrics that reports and grids show, by their name in `metrics.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterMetric:
    """The presentation of a router metric.

    Args:
        title: title of the metric's row in a report, and of its panel in a figure.
        column: heading in the table of a grid; "" omits the metric there.
        is_drawn: whether figures have a panel for the metric.
        is_row: whether the report has a row for the metric.
        is_sum: whether to show the sum over the layers instead of their mean.
    """

    title: str
    column: str = ""
    is_drawn: bool = False
    is_row: bool = True
    is_sum: bool = False


ROUTER_METRICS = {
    "dropped": RouterMetric("share of token slots dropped", "dropped", is_drawn=True),
    "load_cv": RouterMetric(  # no row, because a report computes this value from the counts of all experts
        "expert load: standard deviation over mean", "load CV", is_drawn=True, is_row=False
    ),
    "load_entropy": RouterMetric("entropy of the expert load (1: perfect balance)", is_drawn=True),
    "dead_experts": RouterMetric("dead experts in all layers (below 1 % of a balanced load)", is_sum=True),
    "load_balancing_loss": RouterMetric("load-balancing loss before its coefficient (1: balanced)"),
    "balancing_bias_range": RouterMetric("range of the load-balancing biases"),
    "expert_distance": RouterMetric(
        "relative distance of experts from their mean (0: copies)", "expert distance", is_drawn=True
    ),
}
