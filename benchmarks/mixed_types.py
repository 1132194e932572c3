"""mixed_types: tasks of two kinds, as the heads of a model give them, against the code that one would write by hand.

Half of the tasks are binary, half are regressions. By hand, each head has a torch loss and a ``MeanMetric`` of its own.
Nothing is weighted, since torch's squared error takes no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from benchmarks.counts import count_kernels
from benchmarks.paired import Step, take_turns
from benchmarks.rivals import LOOP_FORWARD
from benchmarks.row import Row, as_much, at_least, at_most, speedup
from benchmarks.workload import OURS, Setting, make_workload, step_of
from twloss import LossType, MultiTaskLoss

__all__ = ["mixed_types"]

LOOP, UPDATE = "loop over heads", "loop + MeanMetric.update"
ONE_TYPE = "one type"
ROWS = (1024, 4096, 65536)
TASKS = 10
GOALS = {4096: {UPDATE: at_least(0.55), LOOP_FORWARD: at_least(1.4)}}
HEADLINES = {
    4096: {
        UPDATE: "10 heads of two types, 4,096 rows, against a loop with MeanMetric.update",
        LOOP_FORWARD: "10 heads of two types, 4,096 rows, against a loop with MeanMetric.forward",
    }
}
KERNELS_GOAL = at_most(2.2)

Heads = dict[str, Tensor]
Types = dict[str, LossType | nn.Module]


def mixed_types(setting: Setting) -> Iterator[Row]:
    """2 types, 10 tasks: forward + backward + tracking, half of the heads binary, half with a squared error."""
    for rows in GOALS if setting.quick else ROWS:
        logits, labels = _make_heads(rows, setting.device)
        steps = {
            OURS: _step(_make_loss(_two_types(TASKS)).to(setting.device), logits, labels),
            LOOP: _loop(logits, labels, None),
            UPDATE: _loop(logits, labels, MeanMetric.update),
            LOOP_FORWARD: _loop(logits, labels, MeanMetric.forward),
        }
        timings = take_turns(steps, setting.device, setting.effort)
        goals, headlines = GOALS.get(rows, {}), HEADLINES.get(rows, {})
        for rival in (LOOP, UPDATE, LOOP_FORWARD):
            headline = headlines.get(rival, "")
            yield speedup(f"{rows:,} × {TASKS}", timings, OURS, rival, goals.get(rival), headline=headline)
    for tasks in (10, 100):
        work = make_workload(64, tasks, setting.device, weighted=False)
        one_type: Types = dict.fromkeys(_two_types(tasks), LossType.BCE_WITH_LOGITS)
        two, one = (
            count_kernels(step_of(_make_loss(types).to(setting.device), work))
            for types in (_two_types(tasks), one_type)
        )
        yield as_much(f"{tasks} tasks", "kernels", two, KERNELS_GOAL, rival=ONE_TYPE, theirs=one)


def _two_types(tasks: int) -> Types:
    squared = nn.MSELoss(reduction="none")
    return {f"task{t}": squared if t % 2 else LossType.BCE_WITH_LOGITS for t in range(tasks)}


def _make_loss(types: Types) -> MultiTaskLoss:
    return MultiTaskLoss(types, list(types))


def _make_heads(rows: int, device: torch.device) -> tuple[Heads, Heads]:
    generator = torch.Generator().manual_seed(0)
    logits = {task: torch.randn(rows, generator=generator).to(device).requires_grad_() for task in _two_types(TASKS)}
    labels = {task: (torch.rand(rows, generator=generator) < 0.2).float().to(device) for task in logits}
    return logits, labels


def _step(loss: MultiTaskLoss, logits: Heads, labels: Heads) -> Step:
    def step() -> None:
        loss(logits, labels)["loss"].backward()
        for head in logits.values():
            head.grad = None

    return step


def _loop(logits: Heads, labels: Heads, track: Callable[[MeanMetric, Tensor, int], object] | None) -> Step:
    functions = [
        F.mse_loss if isinstance(each, nn.Module) else F.binary_cross_entropy_with_logits
        for each in _two_types(TASKS).values()
    ]
    metrics = [MeanMetric().to(head.device) for head in logits.values()]

    def step() -> None:
        losses = [function(logits[task], labels[task]) for task, function in zip(logits, functions)]
        torch.stack(losses).mean().backward()
        if track is not None:
            for metric, loss in zip(metrics, losses):
                track(metric, loss.detach(), len(labels["task0"]))
        for head in logits.values():
            head.grad = None

    return step
