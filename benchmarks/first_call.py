"""first_call: how long the first fused step of a process takes, which is what it takes to compile it.

Each in a process of its own, from the call on, after the imports: with a cache of torch's that is empty, and then with
the one that the first process has left. The step is that of training; the first one of an evaluation takes as long
again. A second kind of input in a process takes less, since the compiler has been loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.row import Row, as_much, at_most, counted
from benchmarks.workload import Setting, kind_of

__all__ = ["first_call"]

GOAL = at_most(0.5)
SECONDS = {"first process, empty cache": at_most(16), "second process": at_most(5)}

CODE = """
import time
import torch
from benchmarks.workload import make_workload, tracked_step

step = tracked_step(make_workload(4096, 10, torch.device({device!r}), weighted={weighted}), fused=True)
started = time.perf_counter()
step()
print(time.perf_counter() - started)
"""


def first_call(setting: Setting) -> Iterator[Row]:
    """The first fused step of a process, without torch's cache and with it."""
    for weighted in (False,) if setting.quick else (True, False):
        with tempfile.TemporaryDirectory() as directory:
            code = CODE.format(device=str(setting.device), weighted=weighted)
            seconds = [_seconds(code, directory) for _ in range(2)]
        kind = kind_of(weighted=weighted)
        for (name, goal), each in zip(SECONDS.items(), seconds):
            yield counted(f"{name}, {kind}", "s", each, goal, timed=True)
        first, second = seconds
        yield as_much(
            f"second process, {kind}", "s", second, GOAL, rival="first process, empty cache", theirs=first, timed=True
        )


def _seconds(code: str, cache: str) -> float:
    """What a process prints that has its cache of compiled code in a directory."""
    command, environment = (
        [sys.executable, "-W", "ignore", "-c", code],
        {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
    )
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
