"""validate_cost: what ``validate_args=True`` adds to a step that is tracked without it."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paired import take_turns
from benchmarks.row import Row, at_most, overhead
from benchmarks.workload import OURS, Setting, kind_of, make_loss, make_workload, step_of, tracked_step

__all__ = ["validate_cost"]

PLAIN = "twloss, validate_args=False"
GOALS = {False: at_most(1.7), True: at_most(1.3)}
"""At 4,096 rows, by whether the step is fused."""


def validate_cost(setting: Setting) -> Iterator[Row]:
    """The tracked step that counts labels that can't be and negative weights, against the one that does not."""
    for weighted in (True, False):
        for rows in (4096, 65536):
            work = make_workload(rows, 10, setting.device, weighted=weighted)
            case = f"{work.size}, {kind_of(weighted=weighted)}"
            for fused in (False, True):
                steps = {
                    OURS: step_of(make_loss(work, validate_args=True, fused=fused), work),
                    PLAIN: tracked_step(work, fused=fused),
                }
                timings = take_turns(steps, setting.device, setting.effort)
                goal = GOALS[fused] if rows == 4096 else None
                yield overhead(f"{case}{', fused' * fused}", timings, OURS, PLAIN, goal)
