"""Run a module-level function on several gloo ranks of this machine.

The ranks are forked from a server that has imported NeMo once. A second call therefore takes a fraction of a second,
instead of the ten seconds of that import. Call `run_ranks` from a test, or under `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from nemo_upcycle.pipeline.executors.local import held_port
from tests.waiting import HANG_S


#: Modules that the server imports. The first module makes the others importable without CUDA. An environment has
#: only one of the last two modules.
_PRELOAD = ["nemo_upcycle.trainers", "torch", "nemo.collections.llm", "megatron.bridge.training.pretrain"]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = HANG_S, process_group: bool = True
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return the ranks' results, in rank order.

    Every rank has torchrun's variables, the default process group (gloo), and one thread for torch.
    `torch.distributed.get_rank()` tells the ranks apart.

    Args:
        function: function that can be pickled, so it must be at the top of a module.
        world_size: number of ranks.
        args: arguments for every rank, pickled.
        timeout_s: time (s) after which the ranks are killed; just before, each writes its stack to stderr.
        process_group: whether to make the default group. False for a function that runs a NeMo trainer, because NeMo
            makes Megatron's groups only together with the default group.

    Raises:
        RuntimeError: A rank raised (the message has its traceback), died or ran out of time.

    Example:
        >>> run_ranks(torch.distributed.get_world_size, 2)  # doctest: +SKIP
        [2, 2]
    """
    context = server()
    payload = pickle.dumps((function, args))
    pipes, processes = [], []
    with held_port() as port:
        variables = _torchrun_variables(world_size, port)
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe()
                job = (payload, variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, process_group, timeout_s)
                process = context.Process(target=_rank_main, args=(sender, *job))
                process.start()
                sender.close()
                pipes.append(receiver)
                processes.append(process)
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(timeout=5.0)  # time for the rank to end its own processes
                process.kill()
                process.join()


def server() -> ForkServerContext:
    """Return the context that forks processes from a server that has imported NeMo."""
    if "nemo" in sys.modules and sys.modules["nemo"] is None:  # hidden: see tests/without_nemo.py
        raise ModuleNotFoundError("the ranks import NeMo", name="nemo")
    # The server reads these variables at import, and its children inherit the values.
    # So set the variables before the server starts.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _torchrun_variables(world_size: int, port: int) -> dict[str, str]:
    size = str(world_size)
    return {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "ranks",  # so that Lightning does not start ranks itself
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _collect(pipes: list[Connection], deadline_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=deadline_s - time.monotonic())
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting)} gave no answer in time")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                worked, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an answer") from None
            if not worked:
                raise RuntimeError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(pipe: Connection, payload: bytes, variables: dict[str, str], group: bool, timeout_s: float) -> None:
    faulthandler.dump_traceback_later(max(timeout_s - 5.0, 1.0), file=sys.__stderr__)
    for kernel in ("FLASH", "FUSED", "UNFUSED"):  # set by Megatron for a model that was built before the fork
        os.environ.pop(f"NVTE_{kernel}_ATTN", None)
    os.environ.update(variables)
    try:
        answer = (True, _call(payload, group, timeout_s))
    except BaseException:
        answer = (False, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(BrokenPipeError):  # another rank failed first
        pipe.send_bytes(pickle.dumps(answer))
        # Stay until the caller ends all ranks: the first rank holds the store, which the others may still query.
        multiprocessing.connection.wait([pipe], timeout=timeout_s)


def _call(payload: bytes, group: bool, timeout_s: float) -> Any:
    import torch

    torch.set_num_threads(1)
    if group:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    function, args = pickle.loads(payload)
    return function(*args)
