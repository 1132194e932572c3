"""kernels: the operators that do work (all but views and detach) in a step, forward + backward + tracking.

They are counted where torch dispatches them; on a GPU the launches that the profiler sees are counted too.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import rivals
from benchmarks.counts import count_kernels, count_launches
from benchmarks.row import Row, at_most, counted, exactly
from benchmarks.workload import Setting, kind_of, make_workload, tracked_step

__all__ = ["kernels"]

ROWS = 256
TASKS = (1, 10, 100)
GOALS = {True: at_most(42), False: at_most(27)}
"""With weights and pos_weights, and without."""


def kernels(setting: Setting) -> Iterator[Row]:
    """Non-view kernels a step, forward + backward + tracking."""
    for weighted in (True, False):
        batches = {tasks: make_workload(ROWS, tasks, setting.device, weighted=weighted) for tasks in TASKS}
        ours = {tasks: count_kernels(tracked_step(work)) for tasks, work in batches.items()}
        kind = kind_of(weighted=weighted)
        for tasks, work in batches.items():
            loop = count_kernels(rivals.loop(work))
            yield counted(_case(tasks, kind), "kernels", ours[tasks], GOALS[weighted], rival=rivals.LOOP, theirs=loop)
        floor = count_kernels(rivals.plain(batches[10]))
        yield counted(_case(10, kind), "kernels", ours[10], rival=rivals.PLAIN, theirs=floor)
        yield counted(f"1, 10 and 100 tasks, {kind}", "different counts", len(set(ours.values())), exactly(1))
    if setting.device.type == "cuda":
        work = make_workload(ROWS, 10, setting.device)
        launches, floor = (count_launches(make(work)) for make in (tracked_step, rivals.plain))
        yield counted("10 tasks, weights, pos_weights", "launches", launches, rival=rivals.PLAIN, theirs=floor)


def _case(tasks: int, kind: str) -> str:
    return f"{tasks} task{'s' * (tasks > 1)}, {kind}"
