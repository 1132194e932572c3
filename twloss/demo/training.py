"""The training: a ranker and rows come in, the losses of each interval go out, the same on every rank.

Every rank holds all rows, draws the same global batches from them and takes its share of each. So all ranks take the
same number of steps, which the collectives of the loss and of DDP need, and a batch is the same however many share it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twloss import GlobalLoss, PendingResult, compute_all
from twloss.demo.movielens import TASKS, Rows, Split
from twloss.demo.options import Options
from twloss.demo.process_group import share
from twloss.demo.ranker import Ranker

__all__ = ["Losses", "Point", "Results", "RowsPerSecond", "evaluate", "train"]

INTERVALS_PER_EPOCH = 2
LEARNING_RATE = 1e-3
# The ids that are made "unknown" in training, so that the unknown id learns to stand for an average user or movie.
FORGOTTEN_SHARE = 0.3

LOSSES = (*(f"loss/{task}" for task in TASKS), "loss")

Losses = dict[str, float]
"""``{"loss/<task>": …, "loss": …}``"""
Results = dict[str, float]
"""The losses, and the quality of the predictions for the binary tasks: ``{…, "ne/<task>": …, …}``; each by decade too:
``{…, "loss/<task>/decade=1990s": …, …}``"""


class Point(NamedTuple):
    """The results over all ranks, at one moment of the training."""

    epoch: int
    """From 1."""
    rows_seen: int
    train: Results
    """Of the rows since the point before."""
    eval: Results
    """Of all rows to evaluate."""


def train(ranker: Ranker, split: Split, options: Options, console: Console) -> list[Point]:
    """Train the ranker in place; measure it ``INTERVALS_PER_EPOCH`` times an epoch, and at the end."""
    model: nn.Module = DistributedDataParallel(ranker) if dist.is_initialized() else ranker
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    steps_per_epoch = math.ceil(len(split.train) / options.batch_size)
    steps, interval = options.epochs * steps_per_epoch, math.ceil(steps_per_epoch / INTERVALS_PER_EPOCH)
    points: list[Point] = []
    rows_seen = 0
    log = _StepLog(ranker.loss.train_metric, console) if options.log_every_step else None
    with _progress(console) as progress:
        bar = progress.add_task(f"epoch 1/{options.epochs}", total=options.epochs * len(split.train))
        for step, batch in enumerate(_shuffled_batches(split.train, options), start=1):
            epoch = math.ceil(step / steps_per_epoch)
            progress.update(bar, description=f"epoch {epoch}/{options.epochs}")
            _training_step(model, optimizer, share(batch))
            rows_seen += len(batch)
            progress.advance(bar, len(batch))
            if log is not None:
                log.start(step)
            if step % interval == 0 or step == steps:
                points.append(Point(epoch, rows_seen, _results(ranker), evaluate(ranker, split.eval, options)))
                # A line stays one where it goes to a file.
                console.print(_line(points[-1], options.epochs), soft_wrap=True)
        if log is not None:
            log.finish()
    return points


def _progress(console: Console) -> Progress:
    """A bar by rows; none where nobody can watch it, as the lines say all but the speed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        RowsPerSecond(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)


class RowsPerSecond(ProgressColumn):
    """The speed of the last while, of all ranks together; the evaluations' time is in it."""

    def render(self, task: Task) -> Text:
        """Called for each refresh."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} rows/s", style="progress.data.speed")


class _StepLog:
    """Prints each step's loss of all ranks' rows, one step later, so that no step waits for the others.

    A view of the running sums has sums of its own: they start anew with each step, and the intervals' go on.
    """

    def __init__(self, metric: GlobalLoss, console: Console) -> None:
        self._loss = metric.scalar("loss")
        self._console = console
        self._pending: tuple[int, PendingResult[Tensor]] | None = None

    def start(self, step: int) -> None:
        """After a step: print the one before, and start the sum over ranks of this one's; on every rank."""
        self.finish()
        self._pending = step, self._loss.compute_async()
        self._loss.reset()

    def finish(self) -> None:
        """Print the step that was started last."""
        if self._pending is not None:
            step, pending = self._pending
            self._console.print(f"step {step:5,}  loss {pending.wait().item():.4f}")


def evaluate(ranker: Ranker, rows: Rows, options: Options) -> Results:
    """The results of all rows, each seen by one rank; the running sums of the training stay."""
    ranker.eval()
    with torch.no_grad():
        for batch in _batches(rows, options.batch_size):
            part = share(batch)
            ranker(part.ids, part.genres, part.labels, part.decades)
    results = _results(ranker)
    ranker.train()
    return results


def _training_step(model: nn.Module, optimizer: torch.optim.Optimizer, part: Rows) -> None:
    losses = model(part.ids, part.genres, part.labels, part.decades)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()


def _results(ranker: Ranker) -> Results:
    """Of all rows in the ranker's mode since the last time; one collective, so every rank has to ask."""
    return {key: value.item() for key, value in compute_all(ranker.loss, reset=True).items()}


def _batches(rows: Rows, batch_size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _shuffled_batches(rows: Rows, options: Options) -> Iterator[Rows]:
    """The global batches of all epochs, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        known = torch.rand(rows.ids.shape, generator=generator) >= FORGOTTEN_SHARE
        epoch = dataclasses.replace(rows, ids=rows.ids * known.to(rows.ids.device))
        yield from _batches(epoch[torch.randperm(len(rows), generator=generator)], options.batch_size)


def _line(point: Point, epochs: int) -> str:
    losses = "  ".join(f"{key.removeprefix('loss/')} {point.train[key]:.3f}" for key in LOSSES)
    place = f"epoch {point.epoch:{len(str(epochs))}}/{epochs}  {point.rows_seen:7,} rows"
    return f"{place}  {losses}  eval {point.eval['loss']:.3f}"
