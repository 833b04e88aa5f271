"""A dense model that runs layer by layer.

Only one layer is in memory at a time, in float32. The outputs of the layer are kept outside the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.hf_model import empty_model, errors_only, stored_name
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.sources.base import DenseSource


#: Arguments with which the model calls each of its layers, by the shape of a batch.
Calls = dict[tuple[int, ...], list[dict[str, Any]]]
#: Function that applies another function to items, several at a time, and yields the results in order.
Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def check_streamed(dense: DenseSource, batches: Iterable[torch.Tensor]) -> None:
    """Check that a dense model can run layer by layer and has these tokens in its vocabulary.

    Args:
        dense: open dense model; if several models are mixed, only the first model is checked.
        batches: token ids.

    Raises:
        CheckpointError: the model cannot run layer by layer, or a token is outside its vocabulary.
    """
    arch, path = dense.architecture, dense.branches()[0].path
    lacks = {
        "Mamba layers": arch.mamba is not None,
        "routers whose input differs from the input of the experts": arch.keeps_network,
        "no config.json": not (path / "config.json").is_file(),
    }
    if got := next((what for what, holds in lacks.items() if holds), ""):
        raise CheckpointError(
            str(path),
            kind="refused",
            got=f"has {got}, so prompts cannot be run through the model layer by layer",
            fix="export the checkpoint first (nemo-upcycle export)" if "json" in got else "use router_init=normal",
        )
    if (largest := max(int(batch.max()) for batch in batches)) >= arch.vocab_size:
        raise CheckpointError(
            "largest token id of the prompts",
            got=largest,
            expected=f"less than {arch.vocab_size}, the vocabulary size of {path}",
            fix="give prompts that were tokenized for this model",
        )


class StreamedModel:
    """A model of transformers that reads the weights of a layer only when the layer computes.

    Args:
        dense: open dense model, not a mix of several models.

    Example:
        >>> model = StreamedModel(dense)  # doctest: +SKIP
        >>> states, calls = model.embedded(batches)  # doctest: +SKIP
    """

    def __init__(self, dense: DenseSource) -> None:
        self.dense = dense
        with errors_only():
            self.model = empty_model(dense.path)
        self.layers = self.model.model.layers

    def embedded(self, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Calls]:
        """Embed each batch of token ids, [B, S], for the first layer, and record how the model calls its layers."""
        used, places = torch.cat([batch.flatten() for batch in batches]).unique(return_inverse=True)
        name = mapping_of("embedding", self.dense.architecture).hf[0]
        rows = self.dense.read(name)[used].float()  # only these rows of a mapped file are read
        module = self.model.get_input_embeddings()
        module.weight = torch.nn.Parameter(rows, requires_grad=False)
        states, calls = list[torch.Tensor](), Calls()
        for batch, numbers in zip(batches, places.split([batch.numel() for batch in batches]), strict=True):
            with _recorded_calls(self.layers) as recorded, torch.no_grad(), suppress(_Recorded):
                self.model.model(numbers.view(batch.shape), use_cache=False)
            states.append(recorded[0].pop("states"))
            calls.setdefault(tuple(batch.shape), recorded)
        module.weight = torch.nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        self.dense.release()
        return states, calls

    def filled(self, layer: int) -> Any:
        """Load the weights of a layer. Calling `.to("meta")` on the layer frees them."""
        module, arch = self.layers[layer], self.dense.architecture
        stored = {name: stored_name(f"model.layers.{layer}.{name}", arch) for name, _ in module.named_parameters()}
        for name in stored.values():
            self.dense.prefetch(name)
        weights = {name: self.dense.read(theirs).to(torch.float32, copy=True) for name, theirs in stored.items()}
        module.load_state_dict(weights, assign=True, strict=False)
        self.dense.release()
        return module


class _Recorded(Exception):
    """All layers were called, so the rest of the model need not run."""


@contextmanager
def _recorded_calls(layers: Any) -> Iterator[list[dict[str, Any]]]:
    """Record how the model calls its layers instead of running them. For the first layer, record its input, too."""
    calls: list[dict[str, Any]] = []

    def recorder(is_last: bool) -> Callable[..., Any]:
        def record(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            call = {"args": args, "kwargs": kwargs}
            calls.append(call if calls else call | {"states": states})
            if is_last:
                raise _Recorded
            return states

        return record

    for number, layer in enumerate(layers):
        layer.forward = recorder(number == len(layers) - 1)
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def several_at_a_time() -> Iterator[Run]:
    """Yield a function that applies another function to items, several at a time, and yields the results in order.

    If several threads compute one matrix product, the number of threads changes the order of the sums. Here each item
    is computed by one thread, and torch's number of threads is the number of items that run at a time. So the results
    do not depend on the number of threads.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
                waiting: deque[Any] = deque()
                try:
                    for item in items:
                        waiting.append(pool.submit(torch.no_grad()(function), item))
                        if len(waiting) > count:  # keep at most one result per thread
                            yield waiting.popleft().result()
                    while waiting:
                        yield waiting.popleft().result()
                finally:
                    for future in waiting:
                        future.cancel()

            yield run
    finally:
        torch.set_num_threads(count)
