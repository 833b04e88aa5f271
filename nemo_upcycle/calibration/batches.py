"""Apply functions to batches on several threads, with the same bits whatever their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def several_at_a_time(threads: int | None = None) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Any]]:
    """Give a function that applies another to items, several at a time, and yields the results in order.

    How a library cuts a product among threads decides in which order it is summed. Here every item is computed by one
    thread, and several items at a time: the results do not depend on how many.

    Args:
        threads: how many items at a time; None: as many as torch has threads.
    """
    before = torch.get_num_threads()
    count = threads or before
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
        torch.set_num_threads(before)
