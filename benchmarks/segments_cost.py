"""segments_cost: what it adds to a step to tell rows apart by two dimensions of 32 ids; and by hand, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.paired import Step, take_turns
from benchmarks.row import Row, at_least, at_most, overhead, speedup
from benchmarks.workload import OURS, Setting, Workload, kind_of, make_loss, make_workload, step_of
from twloss import MultiTaskLoss, RankingQuality

__all__ = ["segments_cost"]

ROWS, TASKS, IDS = 65536, 10, 32
SEGMENTS = {"country": IDS, "surface": IDS}
PLAIN, BY_HAND = "twloss, segments=None", f"{len(SEGMENTS) * (IDS + 1)} RankingQuality, each of masked weights"
GOAL, GOAL_BY_HAND = at_most(1.6), at_least(10)
"""Of the step without weights, eager and fused; and of RankingQuality.update()."""


def segments_cost(setting: Setting) -> Iterator[Row]:
    """The tracked step with two dimensions of 32 segments, against the one without; and against a metric a cell."""
    generator = torch.Generator().manual_seed(0)
    # Some of the rows are of the cell "other".
    ids = {name: torch.randint(-1, IDS, (ROWS,), generator=generator).to(setting.device) for name in SEGMENTS}
    for weighted in (False, True):
        work = make_workload(ROWS, TASKS, setting.device, weighted=weighted)
        for quality in (False, True):
            for fused in (False, True):
                options = {"quality": quality, "fused": fused}
                steps = {OURS: _step(work, ids, **options), PLAIN: _plain_step(work, **options)}
                timings = take_turns(steps, setting.device, setting.effort)
                case = f"{work.size}, {kind_of(weighted=weighted)}{', quality=True' * quality}{', fused' * fused}"
                yield overhead(case, timings, OURS, PLAIN, None if weighted or quality else GOAL)
    work = make_workload(ROWS, TASKS, setting.device, weighted=False)
    updates = {OURS: _update(work, ids), BY_HAND: _updates_by_hand(work, ids)}
    timings = take_turns(updates, setting.device, setting.effort)
    yield speedup(f"{work.size}, RankingQuality.update()", timings, OURS, BY_HAND, GOAL_BY_HAND)


def _step(work: Workload, ids: dict[str, Tensor], *, quality: bool, fused: bool) -> Step:
    options = {"pos_weights": work.pos_weights, "quality": quality, "fused": fused}
    loss = MultiTaskLoss("bce_with_logits", work.tasks, segments=SEGMENTS, **options).to(work.logits.device)  # type: ignore[arg-type]

    def step() -> None:
        loss(work.logits, work.labels, work.weights, segments=ids)["loss"].backward()
        work.logits.grad = None

    return step


def _plain_step(work: Workload, *, quality: bool, fused: bool) -> Step:
    return step_of(make_loss(work, quality=quality, fused=fused), work)


def _update(work: Workload, ids: dict[str, Tensor]) -> Step:
    metric = RankingQuality(work.tasks, segments=SEGMENTS).to(work.logits.device)
    logits = work.logits.detach()
    return lambda: metric.update(logits, work.labels, segments=ids)


def _updates_by_hand(work: Workload, ids: dict[str, Tensor]) -> Step:
    """One metric a cell, which gets all rows, with a weight of 1 where they are in the cell."""
    cells = [(each, cell) for each in ids.values() for cell in range(-1, IDS)]
    metrics = [RankingQuality(work.tasks).to(work.logits.device) for _ in cells]
    logits = work.logits.detach()

    def step() -> None:
        for metric, (each, cell) in zip(metrics, cells):
            metric.update(logits, work.labels, (each == cell).float())

    return step
