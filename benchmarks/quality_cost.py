"""quality_cost: what ``quality=True`` adds to a step that is tracked without it."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paired import take_turns
from benchmarks.row import Row, at_most, overhead
from benchmarks.workload import OURS, Setting, kind_of, make_loss, make_workload, step_of, tracked_step

__all__ = ["quality_cost"]

PLAIN = "twloss, quality=False"
GOALS = {True: (at_most(2.1), at_most(1.35)), False: (at_most(1.45), at_most(1.15))}
"""At 4,096 rows, of the eager and of the fused step, by whether there are weights and pos_weights.

Both sums of the fused step come from one pass, those of single kernels from two.
"""


def quality_cost(setting: Setting) -> Iterator[Row]:
    """The tracked step with normalised entropy and calibration, quality=True, against the one without."""
    for weighted in (True, False):
        for rows in (4096, 65536):
            work = make_workload(rows, 10, setting.device, weighted=weighted)
            case = f"{work.size}, {kind_of(weighted=weighted)}"
            for fused in (False, True):
                steps = {
                    OURS: step_of(make_loss(work, quality=True, fused=fused), work),
                    PLAIN: tracked_step(work, fused=fused),
                }
                timings = take_turns(steps, setting.device, setting.effort)
                goal = GOALS[weighted][fused] if rows == 4096 else None
                yield overhead(f"{case}{', fused' * fused}", timings, OURS, PLAIN, goal)
