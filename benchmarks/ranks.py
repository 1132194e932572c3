"""Real gloo ranks: processes of one thread on the loopback interface that run a benchmark's function side by side."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.machine import steady_machine
from benchmarks.paired import no_collector

__all__ = ["run_on_ranks", "seconds_from_a_barrier"]


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a module-level ``function(*args)`` on every rank of a new process group; the results by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: if a rank raised; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="twloss-ranks-") as directory:
        spawn(_rank, (world_size, directory, function, args), nprocs=world_size)
        return [pickle.loads(_result_file(directory, rank).read_bytes()) for rank in range(world_size)]


def seconds_from_a_barrier(call: Callable[[], object]) -> float:
    """How long a call takes on this rank that all of them begin together."""
    with no_collector():
        dist.barrier()
        started = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - started) * 1e-9


def _rank(rank: int, world_size: int, directory: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    steady_machine()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = Path(directory, "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    result = function(*args)
    _result_file(directory, rank).write_bytes(pickle.dumps(result))
    # No rank may leave while another still answers it.
    dist.barrier()
    # Without the interpreter's end, in which a thread of gloo's now and then aborts the process.
    os._exit(0)


def _result_file(directory: str, rank: int) -> Path:
    return Path(directory, f"result-{rank}")
