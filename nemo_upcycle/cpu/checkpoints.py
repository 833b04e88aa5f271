"""Write checkpoints on a CPU without Megatron's extra processes: forks in release 0.15, a server in later releases."""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import queue
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.utils.attributes import temporarily_set


_PR_SET_PDEATHSIG = 1  # Linux only, from sys/prctl.h


def write_checkpoints_without_threads() -> None:
    """Write a checkpoint in the process that asks for it: this process, or the one child of an asynchronous save.

    Without this patch the first save hangs if this process computes with more than one thread: Megatron forks a writer
    for each file, and copying a tensor in a fork waits for OpenMP threads, which do not exist in a fork. Each rank
    would also spawn a process that collects the reports, and this process needs ten seconds to import NeMo. Later
    releases write with threads, but still spawn the process for the reports.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer, parent = filesystem_async.FileSystemWriterAsync, os.getpid()
    if not hasattr(writer, "write_preloaded_data_multiproc"):
        reports = functools.cache(FolderQueue)
        filesystem_async.get_write_results_queue = lambda mp_mode="spawn": reports()
        return

    def write_all(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], reports: FolderQueue) -> None:
        if os.getpid() != parent:
            _end_with_parent()
        results = {}
        for number, bucket in enumerate(buckets):
            waiting: queue.Queue[Any] = queue.Queue()
            waiting.put(number)
            report: queue.Queue[Any] = queue.Queue()
            writer.write_preloaded_data(transforms, number, bucket, report, waiting, use_fsync=True, use_msc=use_msc)
            _, result = report.get()
            if isinstance(result, Exception):
                reports.put(result)
                return
            results[number] = result
        reports.put(results)

    writer.write_preloaded_data_multiproc = staticmethod(write_all)
    filesystem_async._get_write_results_queue = functools.cache(FolderQueue)


class _Later:
    """Stands in for a tensor while Megatron plans a save; its device tells Megatron that no copy is needed."""

    device = torch.device("meta")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def detach(self) -> _Later:
        """Return itself."""
        return self


def copy_views_as_they_are_written() -> None:
    """Copy a parameter that is a view of a buffer just before it is written, instead of all parameters beforehand.

    Without this patch a save needs 2 GB more on each rank of the demo. (Without any copy, the whole buffer would be
    written.)
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    prepare, write = writer.prepare_write_data, filesystem_async._write_item

    def prepare_views(self: Any, plan: Any, planner: Any) -> None:
        resolve = planner.resolve_data

        def deferred(item: Any) -> Any:
            data = resolve(item)
            return _Later(data.detach().contiguous()) if isinstance(data, torch.Tensor) else data

        with temporarily_set(planner, "resolve_data", deferred):
            prepare(self, plan, planner)
        self.write_buckets = [
            (path, key, (data, [(item, later.tensor) for item, later in tensors]))
            for path, key, (data, tensors) in self.write_buckets
        ]

    @functools.wraps(write)  # Megatron looks at the function's signature
    def write_copy(*args: Any, **kwargs: Any) -> Any:
        return write(*(_copied(arg) if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)

    writer.prepare_write_data = prepare_views
    filesystem_async._write_item = write_copy


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that owns its memory, made without OpenMP, because OpenMP's threads do not survive a fork."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return copy


def _end_with_parent() -> None:
    """End this forked writer when the training is killed, because the next start may write to the same place."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class FolderQueue:
    """Passes pickled values of any size to this process from itself and its forks, in the order of their arrival.

    A `multiprocessing.Queue` would hang: its pipe holds 64 KiB, and Megatron joins the fork before it reads.

    Example:
        >>> reports = FolderQueue()
        >>> reports.put({0: "done"})
        >>> reports.get_nowait()
        {0: 'done'}
    """

    def __init__(self) -> None:
        self._owner = tempfile.TemporaryDirectory(prefix="nemo_upcycle_")
        self._folder = Path(self._owner.name)

    def put(self, value: Any) -> None:
        """Add a value."""
        aside = self._folder / f".{time.time_ns()}"
        aside.write_bytes(pickle.dumps(value))
        aside.rename(self._folder / aside.name[1:])

    def get_nowait(self) -> Any:
        """Take the oldest value.

        Raises:
            queue.Empty: the queue has no value.
        """
        for path in sorted(self._folder.glob("[0-9]*")):
            value = pickle.loads(path.read_bytes())  # written by `put`, in a folder that only this user can enter
            path.unlink()
            return value
        raise queue.Empty
