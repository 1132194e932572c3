"""global_batch_cost: what global_batch=True, the loss of all ranks' rows with an exact gradient, adds to a step.

Two gloo ranks run the same step with and without it. Collectives are counted, with their bytes, in forward and in
backward apart; there is no DistributedDataParallel around the loss, so those that are seen are the loss's own. In the
timed part both kinds of step come after a barrier.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.counts import CollectiveLog
from benchmarks.paired import Timings
from benchmarks.ranks import run_on_ranks, seconds_from_a_barrier
from benchmarks.row import Row, counted, exactly, overhead
from benchmarks.workload import Setting, Workload, make_workload, step_of
from twloss import MultiTaskLoss

__all__ = ["global_batch_cost"]

ROWS = 4096
GLOBAL, LOCAL = "global_batch=True", "global_batch=False"


def global_batch_cost(setting: Setting) -> Iterator[Row]:
    """A step with global_batch=True against one with False, on 2 ranks."""
    for tasks in (10, 100):
        (forward, backward), local, timings = run_on_ranks(2, _measure, tasks, 3 if setting.quick else 201)[0]
        case = f"2 ranks, {ROWS:,} × {tasks}"
        three_float64_a_task = exactly(3 * tasks * torch.float64.itemsize)
        for where, unit, ours, theirs, goal in (
            ("forward", "collectives", len(forward), len(local[0]), exactly(1)),
            ("forward", "bytes over the network", sum(forward), sum(local[0]), three_float64_a_task),
            ("backward", "collectives", len(backward), len(local[1]), exactly(0)),
        ):
            yield counted(f"{case}, {where}", unit, ours, goal, rival=LOCAL, theirs=theirs)
        yield overhead(f"{case}, step", timings, GLOBAL, LOCAL)


def _measure(tasks: int, rounds: int) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]], Timings]:
    """On one rank: the collectives' bytes with and without global_batch, and the seconds of both."""
    work = make_workload(ROWS, tasks, torch.device("cpu"))
    losses = {name: _loss(work, global_batch=name == GLOBAL) for name in (GLOBAL, LOCAL)}
    collectives = {name: _collectives(loss, work) for name, loss in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            seconds[name].append(seconds_from_a_barrier(step_of(loss, work)))
    return collectives[GLOBAL], collectives[LOCAL], Timings(seconds)


def _loss(work: Workload, *, global_batch: bool) -> MultiTaskLoss:
    return MultiTaskLoss("bce_with_logits", work.tasks, pos_weights=work.pos_weights, global_batch=global_batch)


def _collectives(loss: MultiTaskLoss, work: Workload) -> tuple[list[int], list[int]]:
    """The bytes of each collective in forward and in backward."""
    with CollectiveLog() as forward:
        value = loss(work.logits, work.labels, work.weights)["loss"]
    with CollectiveLog() as backward:
        value.backward()
    return forward.bytes, backward.bytes
