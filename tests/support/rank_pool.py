"""Real gloo ranks: processes on the loopback interface that run a test's function side by side.

Ranks are forked from a server that has imported what the tests import, which takes seconds, and done nothing else; and
they are kept for the whole test session. After a failure they are thrown away, since a rank may wait in a collective
that the others have left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support import compiler
from tests.support.patience import PATIENCE, SECONDS

CONTEXT = mp.get_context("forkserver")

eager_alone = pytest.mark.parametrize("eager_and_fused", [False], ids=["eager"], indirect=True)
"""For tests on ranks in files that use the fixture, which patches this process and not the ranks."""


def preload_the_tests() -> None:
    """Have the server, if it is not there yet, import the tests that this process has, and all that these import."""
    CONTEXT.set_forkserver_preload([name for name in sys.modules if name.startswith("tests.")])


class RankFailedError(Exception):
    """A rank raised; the message is its traceback."""


class RankPool:
    """``world_size`` processes in one gloo process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a module-level ``function(rank, *args)`` on every rank; the results by rank.

        Raises:
            RankFailedError: if any rank raised, died or took too long; with every traceback there is.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.world_size)))
        while waiting:
            # Longer than a collective waits, whose error says more. After one failure the others may wait for ever.
            limit = 10.0 if failures else 2 * SECONDS
            ready = [each for each in wait(list(waiting), limit) if isinstance(each, Connection)]
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), "no answer"))
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else failures)[rank] = value
        if failures:
            self.stop()
            raise RankFailedError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(self.world_size)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._connections, self._processes = [], []

    def _start(self) -> None:
        preload_the_tests()
        directory = tempfile.mkdtemp(prefix="twloss-ranks-")
        for rank in range(self.world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(rank, self.world_size, os.path.join(directory, "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)


def on_one_or_two(request: pytest.FixtureRequest, function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """``function(rank, *args)`` in this process or on two ranks, by a fixture's parameter; the results by rank."""
    if request.param == 1:
        return lambda *args: [function(0, *args)]
    pool: RankPool = request.getfixturevalue("two_ranks")
    return lambda *args: pool.run(function, *args)


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    """One rank's life: join the group, then run what comes through the connection until it closes."""
    warnings.simplefilter("error")
    # By torch's own modules, when its compiler is loaded.
    warnings.filterwarnings("ignore", ".*torch.jit.script_method", DeprecationWarning)
    torch.set_num_threads(1)
    compiler.use(compiler.AOT_EAGER)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=PATIENCE)
    with contextlib.suppress(EOFError):
        while True:
            function, args = connection.recv()
            try:
                torch.manual_seed(0)
                connection.send((True, function(rank, *args)))
            except BaseException:
                connection.send((False, traceback.format_exc()))
