"""step_cost: the time of a training step, forward + backward + tracking, with weights and pos_weights.

twloss, fused and not, against every rival, over rows and tasks. The rivals without tracking do less; they are here to
show the floor.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import rivals
from benchmarks.paired import take_turns
from benchmarks.row import Row, at_least, speedup
from benchmarks.workload import FUSED, OURS, Setting, make_workload, tracked_step

__all__ = ["step_cost"]

ROWS = (1024, 4096, 65536)
TASKS = (1, 10, 100)
GOALS = {
    (4096, 10): {rivals.LOOP: at_least(2.4), rivals.LOOP_FORWARD: at_least(5)},
    (4096, 100): {rivals.LOOP: at_least(8), rivals.LOOP_FORWARD: at_least(15)},
}
HEADLINES = {
    (4096, 10): {
        rivals.LOOP: "fused step, 4,096 × 10, weighted, against a loop over tasks",
        rivals.LOOP_FORWARD: "fused step, 4,096 × 10, weighted, against a loop with MeanMetric.forward",
    }
}


def step_cost(setting: Setting) -> Iterator[Row]:
    """The time of a training step: forward + backward + tracking, with weights and pos_weights."""
    sizes = GOALS if setting.quick else [(rows, tasks) for rows in ROWS for tasks in TASKS]
    for rows, tasks in sizes:
        work = make_workload(rows, tasks, setting.device)
        steps = {name: make(work) for name, make in rivals.STEPS.items()}
        ours = {OURS: tracked_step(work), FUSED: tracked_step(work, fused=True)}
        timings = take_turns({**ours, **steps}, setting.device, setting.effort)
        for name in steps:
            yield speedup(work.size, timings, OURS, name)
        goals, headlines = GOALS.get((rows, tasks), {}), HEADLINES.get((rows, tasks), {})
        for name in steps:
            headline = headlines.get(name, "")
            yield speedup(f"{work.size}, fused", timings, FUSED, name, goals.get(name), headline=headline)
