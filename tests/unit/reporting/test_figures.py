from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_upcycle.evaluation.heldout import BITS
from nemo_upcycle.reporting.figures import heldout_figure, load_figure, loss_figure, routers_figure
from nemo_upcycle.reporting.run_folder import Curve, read_curve
from tests.unit.reporting.conftest import metrics
from tests.unit.reporting.drawn import faults_of


STEPS = [line for line in metrics("pretrain") if "loss" in line]
DENSE = [line for line in metrics("dense_ct") if "loss" in line]


def long_run(steps: int) -> list[dict[str, Any]]:
    """Return steps with 32 layers of 8 experts: layer 0 is dense, expert 0 of layer l gets l / 100 above its share."""
    load = np.full((32, 8), 1 / 8)
    load[:, 0] += np.arange(32) / 100
    load[:, 1] -= np.arange(32) / 1000
    load[0] = 0
    return [
        {"step": step, "loss": 3.0 - step / steps, "tokens": 1000 * step, "seconds": 1.0, "expert_load": load.tolist()}
        for step in range(1, steps + 1)
    ]


def lines_of(figure: Any) -> dict[str, Any]:
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.lines}


def test_validation_is_the_line_and_training_the_background() -> None:
    curves = {"pretrain": Curve(STEPS, [(0, 3.6), (3000, 3.5)]), "dense_ct": Curve(DENSE, [(0, 3.5), (3000, 3.4)])}
    lines = lines_of(loss_figure(curves))
    validation, training = lines["MoE, validation"], lines["MoE, training"]
    assert validation.get_xydata().tolist() == [[0, 3.6], [3000, 3.5]]
    assert validation.get_marker() == "o"
    assert training.get_xydata().tolist() == [[line["tokens"], line["loss"]] for line in STEPS]
    assert (validation.get_alpha() or 1) > training.get_alpha()
    assert list(lines["parent, validation"].get_ydata()) == [3.5, 3.5]


def test_what_validation_began_with_is_the_line_to_compare_with() -> None:
    lines = lines_of(loss_figure({"pretrain": Curve(STEPS, [(1000, 3.5)]), "dense_ct": Curve(DENSE, [])}))
    assert set(lines) == {"MoE, validation", "MoE, training", "baseline, training"}
    lines = lines_of(loss_figure({"pretrain": Curve(STEPS, [(0, 3.75), (1000, 3.5)])}))
    assert list(lines["MoE at step 0, validation"].get_ydata()) == [3.75, 3.75]


def test_losses_stand_over_flops_too_where_they_are_known() -> None:
    curves = {"pretrain": Curve(STEPS, []), "dense_ct": Curve(DENSE, [])}
    flops = lines_of(loss_figure(curves, {"pretrain": 3e9, "dense_ct": 2e9}))
    assert flops["MoE, training"].get_xdata().tolist() == [3e12, 6e12, 9e12]
    assert flops["baseline, training"].get_xdata().tolist() == [2e12, 4e12, 6e12]
    tokens = lines_of(loss_figure(curves))
    assert [line.get_xdata().tolist() for line in tokens.values()] == [[1000, 2000, 3000]] * 2


def test_a_live_score_has_the_interval_of_its_documents(tmp_path: Path) -> None:
    line = {
        "step": 1,
        "loss": 3.0,
        "tokens": 1000,
        "seconds": 1.0,
        "evaluation": {BITS: {"value": 2.0, "stderr": 0.1}},
    }
    sources = {"law": {"documents": 3}, "web": {"documents": 2}}
    text = "".join(json.dumps(line | more) + "\n" for more in ({"sources": sources}, {}))
    (tmp_path / "metrics.jsonl").write_text(text)
    scores = read_curve(tmp_path / "metrics.jsonl").scores
    assert scores == [(1000, 2.0, pytest.approx(0.2776, abs=1e-4)), (1000, 2.0, None)]  # t for 4 degrees: 2.776


def test_held_out_text_has_a_band_of_its_interval() -> None:
    figure = heldout_figure({"pretrain": Curve(STEPS, [], [(0, 2.0, 0.1), (3000, 1.5, None)])})
    assert figure is not None
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 2.0], [3000, 1.5]]
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert {(0.0, 2.0 - 0.1), (0.0, 2.0 + 0.1), (3000.0, 1.5)} <= corners
    assert heldout_figure({"pretrain": Curve(STEPS, [])}) is None


def test_routers_are_drawn_with_the_range_of_their_layers() -> None:
    steps = [line | {"router": {"load_cv": [0.1, None, 0.3], "dropped": [0.0, None, 0.5]}} for line in STEPS]
    figure = routers_figure(Curve(steps, []))
    assert figure is not None
    dropped, load = figure.axes
    assert load.lines[0].get_ydata().tolist() == pytest.approx([0.2] * 3)
    assert dropped.lines[0].get_ydata().tolist() == pytest.approx([0.25] * 3)
    heights = dropped.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.0, 0.5)
    assert routers_figure(Curve(DENSE, [])) is None


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6, 2400])
def test_every_figure_is_whole(steps: int) -> None:
    layers = {"load_cv": [None, 0.1, 0.3], "load_entropy": [None, 0.9, 0.95], "dropped": [None, 0.0, 0.1]}
    lines = [line | {"tokens": 4_194_304 * line["step"], "router": layers} for line in long_run(steps)]
    last = lines[-1]["tokens"]
    curve = Curve(lines, [(0, 3.0), (last, 2.0)], [(0, 1.0, 0.01), (last, 0.9, 0.01)])
    curves = {"pretrain": curve, "dense_ct": curve}
    figures = [loss_figure(curves, {"pretrain": 8e10, "dense_ct": 5e10}), loss_figure(curves), heldout_figure(curves)]
    figures += [routers_figure(curve), load_figure(curve)]
    assert [faults_of(figure) for figure in figures] == [[]] * 5
    ends = [axes.get_xlim()[1] for figure in figures[1:4] for axes in figure.axes]  # type: ignore[union-attr]
    assert ends == pytest.approx([last] * 5, rel=0.02)


def test_many_steps_become_means_of_a_few() -> None:
    steps = long_run(2399)
    (training,) = lines_of(loss_figure({"pretrain": Curve(steps, [])})).values()
    assert training.get_label() == "MoE, training, 12-step means"
    points = training.get_xydata()
    assert points.shape == (200, 2)
    assert points[0].tolist() == pytest.approx([6_500, 3.0 - 6.5 / 2399])  # steps 1 to 12
    heat_map = load_figure(Curve(steps, [])).axes[0].images[0]  # type: ignore[union-attr]
    assert heat_map.get_array().shape == (32, 200)
    assert heat_map.get_extent() == [0.5, 2399.5, 31.5, -0.5]


def test_the_load_of_every_layer_is_drawn_at_every_step() -> None:
    steps = long_run(6)
    steps[3] = steps[3] | {"expert_load": [[0.0] * 8] + [[0.5, 0.5, *[0.0] * 6]] * 31}
    figure = load_figure(Curve(steps, []))
    assert figure is not None
    (heat_map,) = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert heat_map.shape == (32, 6)
    assert heat_map.mask[0].all()  # a layer without experts stays blank
    assert heat_map[31].tolist() == pytest.approx([3.48, 3.48, 3.48, 4.0, 3.48, 3.48])  # (1/8 + 0.31) * 8
    assert load_figure(Curve(DENSE, [])) is None
