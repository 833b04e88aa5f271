"""A dense model that computes layer by layer: one is in memory, in float32, and what it hands on is kept outside."""

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


#: How the model calls its layers, by the shape of a batch.
Calls = dict[tuple[int, ...], list[dict[str, Any]]]
#: Applies a function to items, several at a time, and yields the results in order.
Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def check_streamed(dense: DenseSource, batches: Iterable[torch.Tensor]) -> None:
    """Check that a dense model can be run layer by layer, and knows these tokens.

    Args:
        dense: the open dense model; of several, the first.
        batches: token ids.

    Raises:
        CheckpointError: it cannot, or does not.
    """
    arch, path = dense.architecture, dense.branches()[0].path
    lacks = {
        "Mamba layers": arch.mamba is not None,
        "routers that see other states than networks do": arch.keeps_network,
        "no config.json": not (path / "config.json").is_file(),
    }
    if got := next((what for what, holds in lacks.items() if holds), ""):
        raise CheckpointError(
            str(path),
            kind="refused",
            got=f"has {got}, and prompts cannot be run through it layer by layer",
            fix="export the checkpoint first (nemo-upcycle export)" if "json" in got else "use router_init=normal",
        )
    if (largest := max(int(batch.max()) for batch in batches)) >= arch.vocab_size:
        raise CheckpointError(
            "token of the sample",
            got=largest,
            expected=f"below {arch.vocab_size}, the vocabulary of {path}",
            fix="give prompts in the tokens of this model",
        )


class StreamedModel:
    """The classes of transformers, whose weights are read when they compute.

    Args:
        dense: the open dense model, one.

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
        """Embed each batch of token ids, [B, S], for the first layer, and note how the model calls its layers."""
        used, places = torch.cat([batch.flatten() for batch in batches]).unique(return_inverse=True)
        name = mapping_of("embedding", self.dense.architecture).hf[0]
        rows = self.dense.read(name)[used].float()  # of a mapped file, no more than these rows are looked at
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
        """Fill a layer with its weights; `.to("meta")` gives them up."""
        module, arch = self.layers[layer], self.dense.architecture
        stored = {name: stored_name(f"model.layers.{layer}.{name}", arch) for name, _ in module.named_parameters()}
        for name in stored.values():
            self.dense.prefetch(name)
        weights = {name: self.dense.read(theirs).to(torch.float32, copy=True) for name, theirs in stored.items()}
        module.load_state_dict(weights, assign=True, strict=False)
        self.dense.release()
        return module


class _Recorded(Exception):
    """All layers were called: what comes behind them is not wanted."""


@contextmanager
def _recorded_calls(layers: Any) -> Iterator[list[dict[str, Any]]]:
    """Note how the model calls its layers, in place of computing them; of the first also with which states."""
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
    """Give a function that applies another to items, several at a time, and yields the results in order.

    How a library cuts a product among threads decides in which order it is summed. Here every item is computed by one
    thread, and as many items at a time as torch has threads: the results do not depend on how many.
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
                        if len(waiting) > count:  # no more results at a time than are computed
                            yield waiting.popleft().result()
                    while waiting:
                        yield waiting.popleft().result()
                finally:
                    for future in waiting:
                        future.cancel()

            yield run
    finally:
        torch.set_num_threads(count)
