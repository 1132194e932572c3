"""What an option of a loss adds to a step that is tracked without it: the loop of quality_cost and validate_cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.paired import take_turns
from benchmarks.row import Goal, Row, overhead
from benchmarks.workload import OURS, Setting, kind_of, make_loss, make_workload, step_of, tracked_step

__all__ = ["option_cost"]


def option_cost(setting: Setting, option: str, goal_of: Callable[[bool, bool], Goal]) -> Iterator[Row]:
    """The tracked step with an option, against the one without.

    Args:
        setting: the command line's.
        option: the name of an argument that is True or False.
        goal_of: the goal at 4,096 rows, by whether there are weights and pos_weights and whether the step is fused.
    """
    plain = f"twloss, {option}=False"
    for weighted in (True, False):
        for rows in (4096, 65536):
            work = make_workload(rows, 10, setting.device, weighted=weighted)
            case = f"{work.size}, {kind_of(weighted=weighted)}"
            for fused in (False, True):
                steps = {
                    OURS: step_of(make_loss(work, fused=fused, **{option: True}), work),
                    plain: tracked_step(work, fused=fused),
                }
                timings = take_turns(steps, setting.device, setting.effort)
                goal = goal_of(weighted, fused) if rows == 4096 else None
                yield overhead(f"{case}{', fused' * fused}", timings, OURS, plain, goal)
