"""sync_cost: compute() over ranks, that is the sum of the running sums and the losses from it.

One GlobalLoss of all tasks against one torchmetrics MeanMetric a task, on real gloo ranks; and all that a training and
an evaluation log, losses and quality, by one compute_all() against one compute() for each of the four metrics, and
against a MetricCollection of MeanMetrics, which gives the losses alone. Each round, every rank updates its metrics (not
timed: it drops MeanMetric's cached value), meets the others at a barrier and then computes. The first rank's clock
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torchmetrics import MeanMetric, MetricCollection

from benchmarks.counts import CollectiveLog
from benchmarks.paired import Timings
from benchmarks.ranks import run_on_ranks, seconds_from_a_barrier
from benchmarks.row import Row, at_least, at_most, counted, exactly, overhead, speedup
from benchmarks.workload import OURS, Setting
from twloss import GlobalLoss, MultiTaskLoss, compute_all

__all__ = ["sync_cost"]

TASKS = (10, 100)
# Twice the collective's payload and ten times the entries of the result, yet less than a quarter longer.
FLAT = at_most(1.25)
HEADLINES = {(2, 10): "compute() on 2 ranks, 10 tasks, against 10 MeanMetrics"}
JOINT, SEPARATE, MEANS = "compute_all()", "four compute() calls", "MetricCollection of MeanMetrics"
OF_ALL = {(2, 10): "compute_all() of four metrics on 2 ranks, 10 tasks, against four compute() calls"}


class _Subject(NamedTuple):
    update: Callable[[], object]
    compute: Callable[[], object]


def sync_cost(setting: Setting) -> Iterator[Row]:
    """compute() on gloo ranks against one MeanMetric a task."""
    for world_size in (2,) if setting.quick else (2, 4):
        collectives, rounds, flat = run_on_ranks(world_size, _measure, setting.quick)[0]
        of_all = run_on_ranks(world_size, _measure_all, setting.quick)[0]
        for tasks, timings in rounds.items():
            case, ours, rival = f"{world_size} ranks, {tasks} tasks", _name(OURS, tasks), _name("MeanMetrics", tasks)
            counts = collectives[ours], collectives[rival]
            yield counted(case, "collectives", counts[0], exactly(1), rival=rival, theirs=counts[1])
            headline = HEADLINES.get((world_size, tasks), "")
            yield speedup(case, timings, ours, rival, at_least(15) if tasks == 10 else None, headline=headline)
        for tasks, (counts, timings) in of_all.items():
            case = f"{world_size} ranks, {tasks} tasks, all of train and eval"
            yield counted(case, "collectives", counts[JOINT], exactly(1), rival=SEPARATE, theirs=counts[SEPARATE])
            headline = OF_ALL.get((world_size, tasks), "")
            yield speedup(case, timings, JOINT, SEPARATE, at_least(3), headline=headline)
            yield speedup(case, timings, JOINT, MEANS)
        few, many = (_name(OURS, tasks) for tasks in TASKS)
        yield overhead(f"{world_size} ranks, 100 tasks", flat, many, few, FLAT)


def _name(subject: str, tasks: int) -> str:
    return f"{OURS}, {tasks} tasks" if subject == OURS else f"{tasks} {subject}"


def _measure(quick: bool) -> tuple[dict[str, int], dict[int, Timings], Timings]:
    """On one rank: collectives by subject; timings of both, by tasks; timings of ours at 10 beside 100 tasks."""
    ours = {tasks: {_name(OURS, tasks): _global_loss(tasks)} for tasks in TASKS}
    both = {tasks: ours[tasks] | {_name("MeanMetrics", tasks): _mean_metrics(tasks)} for tasks in TASKS}
    collectives = {name: _collectives(subject) for pair in both.values() for name, subject in pair.items()}
    rounds = {10: 3 if quick else 101, 100: 3 if quick else 11}
    timings = {tasks: _take_turns(pair, rounds[tasks]) for tasks, pair in both.items()}
    return collectives, timings, _take_turns(ours[10] | ours[100], 5 if quick else 501)


def _measure_all(quick: bool) -> dict[int, tuple[dict[str, int], Timings]]:
    """On one rank, by tasks: collectives and timings of everything that a training and an evaluation log."""
    found = {}
    for tasks in TASKS:
        subjects = {**_everything(tasks), MEANS: _collection(tasks)}
        collectives = {name: _collectives(subject) for name, subject in subjects.items()}
        rounds = (3 if quick else 101) if tasks == TASKS[0] else (2 if quick else 11)
        found[tasks] = collectives, _take_turns(subjects, rounds)
    return found


def _take_turns(subjects: dict[str, _Subject], rounds: int) -> Timings:
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            seconds[name].append(_seconds(subject))
    return Timings(seconds)


def _seconds(subject: _Subject) -> float:
    subject.update()
    return seconds_from_a_barrier(subject.compute)


def _collectives(subject: _Subject) -> int:
    subject.update()
    with CollectiveLog() as log:
        subject.compute()
    return len(log.bytes)


def _global_loss(tasks: int) -> _Subject:
    metric = GlobalLoss([f"task{t}" for t in range(tasks)])
    sums = torch.rand(tasks, dtype=torch.float64)
    return _Subject(lambda: metric.update(sums, 4096), metric.compute)


def _everything(tasks: int) -> dict[str, _Subject]:
    """The losses and the quality of training and evaluation, asked for at once and one by one."""
    losses = {
        mode: MultiTaskLoss("bce_with_logits", [f"task{t}" for t in range(tasks)], quality=True)
        for mode in ("train", "eval")
    }
    losses["eval"].eval()
    batch = torch.randn(64, tasks), torch.randint(0, 2, (64, tasks))
    train, evaluation = losses.values()
    metrics = (train.train_metric, train.train_quality, evaluation.eval_metric, evaluation.eval_quality)

    def update() -> None:
        for loss in losses.values():
            loss(*batch)

    return {
        JOINT: _Subject(update, lambda: compute_all(losses)),
        SEPARATE: _Subject(update, lambda: [metric.compute() for metric in metrics]),
    }


def _collection(tasks: int) -> _Subject:
    """A mean for each task's loss, of training and of evaluation."""
    names = [f"{mode}/loss/task{t}" for mode in ("train", "eval") for t in range(tasks)]
    collection = MetricCollection({name: MeanMetric() for name in names}, compute_groups=False)
    means = torch.rand(len(names)).unbind()

    def update() -> None:
        for metric, mean in zip(collection.values(copy_state=False), means):
            metric.update(mean, 4096)

    return _Subject(update, collection.compute)


def _mean_metrics(tasks: int) -> _Subject:
    metrics = [MeanMetric() for _ in range(tasks)]
    means = torch.rand(tasks).unbind()

    def update() -> None:
        for metric, mean in zip(metrics, means):
            metric.update(mean, 4096)

    return _Subject(update, lambda: [metric.compute() for metric in metrics])
