"""FP8 losses on a GPU: Transformer Engine's own statistics, collected with nvdlfw-inspect, for `metrics.jsonl`.

Not verified on a GPU. Names, configuration and sums are tested without a GPU.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import SpecError


#: Maps Transformer Engine's kind of tensor to the name of the kind in `cpu.fp8_losses`.
_KINDS = {"activation": "input", "weight": "weight", "gradient": "gradient"}
#: Extremes that are kept for each kind of tensor, by Transformer Engine's names.
_EXTREMES = {"cur_amax": max, "scale_inv_min": min, "scale_inv_max": max}
_UNDERFLOW = "underflows%"


class Fp8Statistics:
    """Collects the statistics that Transformer Engine logs for this rank's layers; a `step_metrics.Probe`.

    `underflow` is the mean of the layers' shares. `amax` and the scales are extremes over all layers.

    Example:
        >>> statistics.describe(sum_over_ranks(statistics.local()))["fp8"]["gradient"]  # doctest: +SKIP
        {'underflow': 0.18, 'amax': 0.0123, 'scale_inv_min': 1.2e-07, 'scale_inv_max': 2.1e-07}
    """

    def __init__(self) -> None:
        self._logged: dict[tuple[str, str], list[float]] = {}

    def log_scalar(self, name: str, value: Any, iteration: int, **_: Any) -> None:
        """Collect a number, as a logger of nvdlfw-inspect.

        Args:
            name: layer, kind of tensor and statistic, joined by underscores.
            value: a number, or a tensor with one element.
            iteration: step of the number.
        """
        for kind in _KINDS:
            for statistic in (_UNDERFLOW, *_EXTREMES):
                if name.endswith(f"_{kind}_{statistic}"):
                    self._logged.setdefault((kind, statistic), []).append(float(value))

    def local(self) -> dict[str, torch.Tensor]:
        """Return this rank's numbers since the last call, to be summed over all ranks; every rank must call this."""
        import nvdlfw_inspect.api as inspect

        inspect.transformer_engine.step()  # logs this step's statistics; `inspect.step` would also count a step
        shares = torch.zeros(len(_KINDS), 2, dtype=torch.float64)
        extremes = torch.zeros(torch.distributed.get_world_size(), len(_KINDS), len(_EXTREMES), dtype=torch.float64)
        own = extremes[torch.distributed.get_rank()].fill_(math.nan)
        for row, kind in enumerate(_KINDS):
            lost = self._logged.get((kind, _UNDERFLOW), [])
            shares[row] = torch.tensor([sum(lost) / 100, len(lost)])
            for column, (statistic, most) in enumerate(_EXTREMES.items()):
                own[row, column] = most(self._logged.get((kind, statistic), [math.nan]))
        self._logged.clear()
        return {"fp8_shares": shares, "fp8_extremes": extremes}

    def describe(self, summed: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Summarise the logged numbers by kind of tensor; empty for a step without statistics."""
        found: dict[str, dict[str, float]] = {}
        for row, name in enumerate(_KINDS.values()):
            share, layers = summed["fp8_shares"][row].tolist()
            values = {"underflow": share / layers} if layers else {}
            for column, (statistic, most) in enumerate(_EXTREMES.items()):
                known = [value for value in summed["fp8_extremes"][:, row, column].tolist() if not math.isnan(value)]
                values |= {statistic.removeprefix("cur_"): most(known)} if known else {}
            found |= {name: {key: float(f"{value:.6g}") for key, value in values.items()}} if values else {}
        return {"fp8": found} if found else {}


def require_inspect(every: int, field: str) -> None:
    """Check that this machine can take the requested statistics; without a GPU, nothing is checked.

    Args:
        every: steps between two statistics; 0: no statistics.
        field: path of the setting, for error messages.

    Raises:
        SpecError: nvdlfw-inspect is not installed.
    """
    if every and torch.cuda.is_available() and not find_spec("nvdlfw_inspect"):
        raise SpecError(
            field=field,
            kind="missing",
            got="needs the package nvdlfw-inspect, which is not installed",
            fix=f"run `pip install nvdlfw-inspect`, or set <{field}>=0",
        )


def features(every: int, precision: Any) -> dict[str, Any]:
    """Return nvdlfw-inspect's configuration for statistics of every layer.

    Args:
        every: steps between two statistics; the first step has statistics.
        precision: NeMo's or Bridge's precision settings; for weights in FP8, Transformer Engine provides only scales.
    """
    keeps_fp8 = any(getattr(precision, name, False) for name in ("fp8_param_gather", "fp8_params"))
    kinds = [kind for kind in _KINDS if not (kind == "weight" and keeps_fp8)]
    scales = [name for name in _EXTREMES if name.startswith("scale")]
    asked = [{"tensor": kind, "stats": [_UNDERFLOW] * (kind in kinds) + scales, "freq": every} for kind in _KINDS]
    return {
        "nemo_upcycle": {
            "enabled": True,
            "layers": {"layer_name_regex_pattern": ".*"},
            "transformer_engine": {
                "LogTensorStats": {"enabled": True, "tensors": kinds, "stats": ["cur_amax"], "freq": every},
                "LogFp8TensorStats": {"enabled": True, "tensors_struct": asked},
            },
        }
    }


def start_inspect(every: int, precision: Any, folder: Path) -> None:
    """Initialise nvdlfw-inspect on this rank, before a module of Transformer Engine is built.

    Args:
        every: steps between two statistics, see `features`.
        precision: the trainer's precision settings, see `features`.
        folder: folder for nvdlfw-inspect's logs.
    """
    import nvdlfw_inspect.api as inspect

    inspect.end_debug()  # an earlier training may have started nvdlfw-inspect
    where = import_module("transformer_engine.debug.features").__path__[0]
    inspect.initialize(
        features(every, precision), feature_dirs=[where], log_dir=str(folder), default_logging_enabled=True
    )


def name_layers(chunks: list[torch.nn.Module], step: int) -> None:
    """Tell nvdlfw-inspect this rank's layers and the number of steps done, once the model is built.

    Args:
        chunks: model chunks on this rank.
        step: number of steps done.
    """
    import nvdlfw_inspect.api as inspect
    from megatron.core.parallel_state import get_tensor_and_data_parallel_group

    inspect.initialize_training_step(step)
    inspect.infer_and_assign_layer_names(chunks)
    inspect.set_tensor_reduction_group(get_tensor_and_data_parallel_group())


def count_step() -> None:
    """Tell nvdlfw-inspect that a step is done."""
    import nvdlfw_inspect.api as inspect

    inspect.step()


def watch_fp8(config: Any) -> Any:
    """Start counting FP8 losses: emulated on a CPU (see `Fp8Losses`), measured on a GPU (see `Fp8Statistics`).

    Returns None if no FP8 is emulated, or if no statistics were requested.

    Args:
        config: the model's configuration.
    """
    if torch.cuda.is_available():
        return watch_inspect()
    from nemo_upcycle.cpu import fp8_recipe
    from nemo_upcycle.cpu.fp8_losses import Fp8Losses

    fp8_recipe.watcher = Fp8Losses() if config.fp8 else None
    return fp8_recipe.watcher


def watch_inspect() -> Fp8Statistics | None:
    """Start collecting statistics in this process; return None if nvdlfw-inspect has not been initialised."""
    if not find_spec("nvdlfw_inspect"):
        return None
    import nvdlfw_inspect.api as inspect
    from nvdlfw_inspect.logging import MetricLogger

    if inspect.DEBUG_MANAGER is None:
        return None
    statistics = Fp8Statistics()
    MetricLogger.add_logger(statistics)
    return statistics
