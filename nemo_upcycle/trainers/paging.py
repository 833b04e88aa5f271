"""Run a model that does not fit into memory: each part has its weights only while it computes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch


#: Function that fills tensors, which are keyed by the names of the model's parameters.
Fill = Callable[[Mapping[str, torch.Tensor]], None]


class PagedModel:
    """A model on the meta device whose parts get their weights just before they compute, and lose them afterwards.

    Weights are filled as float32. With `dtype` float64 the same numbers are converted to float64.

    Args:
        model: model on the meta device, with real buffers.
        parts: names of the modules that take turns; together they hold every parameter.
        fill: function that fills the parameters of a part.
        stay: parts that keep their weights because other parts use them, too.
        device: where to compute.

    Example:
        >>> paged = PagedModel(model, ["embed", "layers.0", "layers.1", "head"], fill)  # doctest: +SKIP
        >>> model(tokens_BS)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parts: Iterable[str],
        fill: Fill,
        *,
        stay: Collection[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.device, self.dtype = model, torch.device(device), torch.float32
        #: Called with the name of a part after the part got its weights.
        self.progress: Callable[[str], None] = lambda part: None
        #: Seconds spent on filling, all parts together.
        self.fill_s = 0.0
        self._fill, self._stay, self._here = fill, stay, set[str]()
        owners: dict[int, list[tuple[torch.nn.Module, str]]] = defaultdict(list)  # a tied weight has two owners
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners[id(parameter)].append((module, name))
        self._owners = {name: owners[id(parameter)] for name, parameter in model.named_parameters()}
        self._names = {part: [name for name in self._owners if name.startswith(f"{part}.")] for part in parts}
        for part in self._names:
            module = model.get_submodule(part)
            module.register_forward_pre_hook(lambda *_, part=part: self.bring(part))
            module.register_forward_hook(lambda *_, part=part: self.drop(part))

    def to(self, dtype: torch.dtype) -> None:
        """Compute in another type from now on."""
        self.clear()
        self.dtype = dtype

    def clear(self) -> None:
        """Release all weights; a part that computes later is filled again."""
        for part in list(self._here):
            self._release(part)

    def bring(self, part: str) -> None:
        """Fill a part, unless it has its weights."""
        if part in self._here:
            return
        shapes = {name: self._parameter(name).shape for name in self._names[part]}
        start_s = time.monotonic()
        self._fill_into({name: torch.empty(shape, device=self.device) for name, shape in shapes.items()})
        self._here.add(part)
        self.fill_s += time.monotonic() - start_s
        self.progress(part)

    def _fill_into(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self._fill(tensors)
        for name in list(tensors):  # one by one, so that no part is in memory in both types
            self._set(name, tensors.pop(name).to(self.dtype))

    def only(self, name: str) -> Any:
        """Return a parameter, and release all other parts except the parts in `stay`."""
        part = next(part for part, names in self._names.items() if name in names)
        for other in self._here - {part}:
            self.drop(other)
        self.bring(part)
        return self._parameter(name)

    def drop(self, part: str) -> None:
        """Release the weights of a part, unless other parts use them."""
        if part not in self._stay:
            self._release(part)

    def _release(self, part: str) -> None:
        for name in self._names[part]:
            self._set(name, torch.empty(self._parameter(name).shape, device="meta"))
        self._here.discard(part)

    def _parameter(self, name: str) -> Any:
        module, attribute = self._owners[name][0]
        return module._parameters[attribute]

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        for module, attribute in self._owners[name]:
            module._parameters[attribute] = parameter
