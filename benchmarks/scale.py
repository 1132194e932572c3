"""scale: how a step's time grows with rows and with tasks: the slope of log time against log elements.

1 is a cost in proportion to the work. The sizes take turns, a slope is fitted to each round, and the median of slopes
counts. One vectorised BCE call without tracking is beside it, since caches and page faults slow it down too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from benchmarks.paired import Spread, Timings, spread_of, take_turns
from benchmarks.rivals import PLAIN, plain
from benchmarks.row import Goal, Row, at_most
from benchmarks.workload import OURS, Setting, make_workload, tracked_step

__all__ = ["scale"]

GOAL = at_most(1.05)
BY_ROWS = tuple((16384 * k, 10) for k in (1, 2, 4, 8, 16))
BY_TASKS = tuple((16384, 10 * k) for k in (1, 2, 4, 8, 16))


def scale(setting: Setting) -> Iterator[Row]:
    """Growth of a step's time with rows and tasks, above 16,384 × 10."""
    for what, sizes in (("rows", BY_ROWS), ("tasks", BY_TASKS)):
        batches = {size: make_workload(*size, setting.device) for size in (sizes[:3] if setting.quick else sizes)}
        steps = {f"{OURS} {size}": tracked_step(work) for size, work in batches.items()}
        steps |= {f"{PLAIN} {size}": plain(work) for size, work in batches.items()}
        timings = take_turns(steps, setting.device, setting.effort)
        for (rows, tasks), work in batches.items():
            yield _time_row(work.size, timings, (rows, tasks))
        ours, theirs = (_slope(timings, name, list(batches)) for name in (OURS, PLAIN))
        yield _slope_row(f"growth with {what}", ours, theirs, GOAL)


def _time_row(case: str, timings: Timings, size: tuple[int, int]) -> Row:
    ours, theirs = (timings.median_us(f"{name} {size}") * 1e3 / math.prod(size) for name in (OURS, PLAIN))
    unit = "ns a row and task"
    return Row(case, PLAIN, ours, theirs, unit, ours, unit, None, None, timed=True)


def _slope(timings: Timings, name: str, sizes: list[tuple[int, int]]) -> Spread:
    elements = [math.log(math.prod(size)) for size in sizes]
    slopes = []
    for seconds in timings.rounds():
        times = [math.log(seconds[f"{name} {size}"]) for size in sizes]
        slopes.append(statistics.linear_regression(elements, times).slope)
    return spread_of(slopes)


def _slope_row(case: str, ours: Spread, theirs: Spread, goal: Goal) -> Row:
    unit = "log-log slope"
    return Row(case, PLAIN, ours.median, theirs.median, unit, ours.median, unit, ours.quartiles, goal, timed=True)
