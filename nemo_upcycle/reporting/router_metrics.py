"""The metrics of the routers that reports and grids show: one row each, by the name in `metrics.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterMetric:
    """How a metric is shown.

    Args:
        title: the title of its row in a report, and of its panel in a figure.
        column: heading in the table of a grid; "": it is not shown there.
        is_drawn: whether figures have a panel of it.
        is_row: whether the report has a row of it.
        is_sum: whether the layers are added up; else their mean is shown.
    """

    title: str
    column: str = ""
    is_drawn: bool = False
    is_row: bool = True
    is_sum: bool = False


ROUTER_METRICS = {
    "dropped": RouterMetric("share of token slots dropped", "dropped", is_drawn=True),
    "load_cv": RouterMetric(  # a report computes it from the counts of all experts
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
