"""tracking_cost: what the running sums and the other guarantees add to a step of one vectorised BCE call."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paired import take_turns
from benchmarks.rivals import PLAIN, plain
from benchmarks.row import Row, at_most, overhead
from benchmarks.workload import OURS, Setting, make_workload, tracked_step

__all__ = ["tracking_cost"]

GOALS = {(4096, 10): at_most(1.15), (65536, 10): at_most(1.05)}


def tracking_cost(setting: Setting) -> Iterator[Row]:
    """Our step, forward + backward + tracking, against one vectorised BCE call that tracks nothing."""
    for weighted in (True, False):
        for (rows, tasks), goal in GOALS.items():
            work = make_workload(rows, tasks, setting.device, weighted=weighted)
            steps = {OURS: tracked_step(work), PLAIN: plain(work)}
            timings = take_turns(steps, setting.device, setting.effort)
            case = work.size if weighted else f"{work.size}, no weights"
            yield overhead(case, timings, OURS, PLAIN, goal if weighted else None)
