"""tracking_cost: what the running sums and the other guarantees add to a step of one vectorised BCE call, or save."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paired import take_turns
from benchmarks.rivals import PLAIN, plain
from benchmarks.row import Row, at_most, overhead
from benchmarks.workload import FUSED, OURS, Setting, kind_of, make_workload, tracked_step

__all__ = ["tracking_cost"]

SIZES = ((4, 10), (4096, 10), (4097, 10), (65536, 10))
GOALS = {
    (4, False): (at_most(4.6), at_most(4.6)),
    (4096, False): (at_most(2.7), at_most(2.0)),
    (4096, True): (at_most(2.5), at_most(1.5)),
    (4097, False): (None, at_most(2.6)),
    (65536, False): (at_most(1.75), at_most(0.7)),
    (65536, True): (at_most(1.4), at_most(0.6)),
}
"""Of the eager step and of the fused one, by rows and whether there are weights and pos_weights."""
HEADLINES = {
    4096: ("eager step, 4,096 × 10, against plain BCE", "fused step, 4,096 × 10, against plain BCE"),
    65536: ("eager step, 65,536 × 10, against plain BCE", "fused step, 65,536 × 10, against plain BCE"),
}
"""Of the eager and the fused step without weights, by rows."""


def tracking_cost(setting: Setting) -> Iterator[Row]:
    """Our step, forward + backward + tracking, against one vectorised BCE call that tracks nothing."""
    for weighted in (True, False):
        for rows, tasks in SIZES:
            work = make_workload(rows, tasks, setting.device, weighted=weighted)
            steps = {OURS: tracked_step(work), FUSED: tracked_step(work, fused=True), PLAIN: plain(work)}
            timings = take_turns(steps, setting.device, setting.effort)
            case = f"{work.size}, {kind_of(weighted=weighted)}"
            eager, fused = ("", "") if weighted else HEADLINES.get(rows, ("", ""))
            goal, goal_of_fused = GOALS.get((rows, weighted), (None, None))
            yield overhead(case, timings, OURS, PLAIN, goal, headline=eager)
            yield overhead(f"{case}, fused", timings, FUSED, PLAIN, goal_of_fused, headline=fused)
