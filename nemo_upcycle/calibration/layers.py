"""How a model of transformers calls its layers, and what enters their networks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_upcycle.init.coactivation import most_active


class Recorded(Exception):
    """All layers were called: what comes behind them is not wanted."""


class LayerInputs:
    """Takes what enters a layer's network, and which neurons it activates, of the batch that this thread computes."""

    def __init__(self, modules: tuple[Any, Any], with_marks: bool) -> None:
        self._local = threading.local()
        network, down = modules
        self._handles = [network.register_forward_pre_hook(self._network)]
        if with_marks:
            self._handles.append(down.register_forward_pre_hook(self._down))

    def _network(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._local.entered = args[0].flatten(0, -2)

    def _down(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._local.marks = most_active(args[0].flatten(0, -2))

    def taken(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return both, [N, D] and [N, F]."""
        return self._local.entered, getattr(self._local, "marks", None)

    def remove(self) -> None:
        """Take nothing any more."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def recorded_calls(layers: Any) -> Iterator[list[dict[str, Any]]]:
    """Note how the model calls its layers, in place of computing them; of the first also with which states."""
    calls: list[dict[str, Any]] = []

    def recorder(is_last: bool) -> Callable[..., Any]:
        def record(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            call = {"args": args, "kwargs": kwargs}
            calls.append(call if calls else call | {"states": states})
            if is_last:
                raise Recorded
            return states

        return record

    for number, layer in enumerate(layers):
        layer.forward = recorder(number == len(layers) - 1)
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.forward
