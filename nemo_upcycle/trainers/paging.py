"""Run a model that does not fit into memory: the weights of a part are there only while that part computes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch


#: Fills tensors, by the names of the model's parameters.
Fill = Callable[[Mapping[str, torch.Tensor]], None]


class PagedModel:
    """A model on the meta device whose parts get their weights just before they compute, and lose them afterwards.

    Weights are filled as float32. With `dtype` float64 they are the same numbers in that type.

    Args:
        model: built on the meta device; its buffers are real.
        parts: names of the modules that take turns and together hold every parameter.
        fill: fills the parameters of a part.
        stay: parts that keep their weights, for others use them too.
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
        #: Called with the name of a part that got its weights.
        self.progress: Callable[[str], None] = lambda part: None
        #: Seconds that filling took, all parts together.
        self.fill_s = 0.0
        self._fill, self._stay, self._here = fill, stay, set[str]()
        owners: dict[int, list[tuple[torch.nn.Module, str]]] = defaultdict(list)  # a tied weight has two
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
        """Take all weights away; parts that compute later get theirs anew."""
        for part in list(self._here):
            self._release(part)

    def bring(self, part: str) -> None:
        """Give a part its weights, unless it has them."""
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
        for name in list(tensors):  # one by one, so that no part is there in both types
            self._set(name, tensors.pop(name).to(self.dtype))

    def only(self, name: str) -> Any:
        """Return a parameter; of other parts, none but those that stay keep their weights."""
        part = next(part for part, names in self._names.items() if name in names)
        for other in self._here - {part}:
            self.drop(other)
        self.bring(part)
        return self._parameter(name)

    def drop(self, part: str) -> None:
        """Take the weights of a part away, unless others use them."""
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
