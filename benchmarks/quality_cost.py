"""quality_cost: what ``quality=True`` adds to a step that is tracked without it."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paired import take_turns
from benchmarks.row import Row, at_most, overhead
from benchmarks.workload import OURS, Setting, make_loss, make_workload, step_of, tracked_step

__all__ = ["quality_cost"]

PLAIN = "twloss, quality=False"
GOALS = {(4096, 10): at_most(1.35), (65536, 10): None}


def quality_cost(setting: Setting) -> Iterator[Row]:
    """The tracked step with normalised entropy and calibration, quality=True, against the one without."""
    for weighted in (True, False):
        for (rows, tasks), goal in GOALS.items():
            work = make_workload(rows, tasks, setting.device, weighted=weighted)
            steps = {OURS: step_of(make_loss(work, quality=True), work), PLAIN: tracked_step(work)}
            timings = take_turns(steps, setting.device, setting.effort)
            case = f"{work.size}, weights, pos_weights" if weighted else f"{work.size}, no weights"
            yield overhead(case, timings, OURS, PLAIN, goal)
