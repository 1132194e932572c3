"""memory: the peak of what a step allocates beyond its inputs, from the allocations that torch's profiler records."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import rivals
from benchmarks.counts import peak_bytes
from benchmarks.row import Row, as_much, at_most
from benchmarks.workload import Setting, kind_of, make_workload, tracked_step

__all__ = ["memory"]

SIZES = ((4096, 10), (65536, 10))
GOAL = at_most(1.01)
"""Of the fused step: no more tensors of the batch's size; those of the tasks' size are beside them."""


def memory(setting: Setting) -> Iterator[Row]:
    """Peak extra memory of a step, forward + backward + tracking."""
    for weighted in (True, False):
        for rows, tasks in SIZES:
            work = make_workload(rows, tasks, setting.device, weighted=weighted)
            case = f"{work.size}, {kind_of(weighted=weighted)}"
            steps = (tracked_step(work), tracked_step(work, fused=True), rivals.plain(work), rivals.loop(work))
            ours, fused, plain, loop = (peak_bytes(step, setting.device) / 2**20 for step in steps)
            yield as_much(case, "MiB", ours, rival=rivals.PLAIN, theirs=plain)
            yield as_much(f"{case}, fused", "MiB", fused, GOAL, rival=rivals.PLAIN, theirs=plain)
            yield as_much(f"{case}, fused", "MiB", fused, rival=rivals.LOOP, theirs=loop)
