"""The examples' oracle: a linear ranker trained by hand, in one process, with Python floats, row by row.

The examples' initial parameters and rows come in, as tensors; losses go out. A step takes all the rows of all ranks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support import reference

Columns = dict[str, list[reference.Row]]


class Rows(NamedTuple):
    """Rows of a batch, by row: features, labels and, where there are any, weights of each task."""

    features: list[list[float]]
    labels: list[list[float]]
    weights: list[list[float]] | None = None

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Rows:
        """The values of tensors ``(rows, …)``; weights ``(rows,)`` count for every task."""
        if weights is not None:
            weights = weights.unsqueeze(1).expand_as(labels) if weights.ndim == 1 else weights
        return cls(
            features.double().tolist(), labels.double().tolist(), None if weights is None else weights.double().tolist()
        )

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the rows."""
        weights = None if self.weights is None else [self.weights[n] for n in indices]
        return Rows([self.features[n] for n in indices], [self.labels[n] for n in indices], weights)

    def batches(self, size: int) -> list[Rows]:
        """Consecutive batches; the last one may be smaller."""
        count = len(self.labels)
        return [self.take(range(start, min(start + size, count))) for start in range(0, count, size)]


class HandRanker:
    """Logits ``W x + b``, binary cross-entropy, gradient descent."""

    def __init__(
        self,
        heads: nn.Linear,
        tasks: Sequence[str],
        *,
        learning_rate: float,
        missing: float | None = None,
        rule: reference.Rule | None = None,
        pos_weights: Sequence[float] | None = None,
    ) -> None:
        self.matrix: list[list[float]] = heads.weight.double().tolist()
        self.bias: list[float] = heads.bias.double().tolist()
        self.tasks = tasks
        self.learning_rate = learning_rate
        self.missing = missing
        self.rule = rule or reference.Rule()
        self.pos_weights = pos_weights or [1.0] * len(tasks)

    def logits(self, rows: Rows) -> list[list[float]]:
        """By row, with the present parameters."""
        return [
            [math.fsum([b, *(w * v for w, v in zip(row, x))]) for row, b in zip(self.matrix, self.bias)]
            for x in rows.features
        ]

    def columns(self, rows: Rows) -> Columns:
        """Each task's rows, with the present parameters."""
        return columns_of(self.logits(rows), rows.labels, rows.weights, self.tasks, self.missing, self.pos_weights)

    def losses(self, rows: Rows) -> dict[str, float]:
        """The losses of rows, with the present parameters."""
        return reference.losses(self.columns(rows), self.rule)

    def parameters(self) -> list[float]:
        """The matrix, row by row, then the bias."""
        return [*(value for row in self.matrix for value in row), *self.bias]

    def step(self, rows: Rows) -> Columns:
        """One step of gradient descent on rows; each task's rows as they were before it."""
        columns = self.columns(rows)
        slopes = reference.gradients(columns, self.rule)
        for t, grads in enumerate(slopes.values()):
            for f in range(len(self.matrix[t])):
                slope = math.fsum(g * x[f] for g, x in zip(grads, rows.features))
                self.matrix[t][f] -= self.learning_rate * slope
            self.bias[t] -= self.learning_rate * math.fsum(grads)
        return columns


def columns_of(
    logits: list[list[float]],
    labels: list[list[float]],
    weights: list[list[float]] | None,
    tasks: Sequence[str],
    missing: float | None,
    pos_weights: Sequence[float],
    cells: Sequence[Sequence[Sequence[str]]] | None = None,
) -> Columns:
    """Each task's rows, from logits and labels by row, and from cells by row and task."""
    result: Columns = {}
    for t, (task, positive) in enumerate(zip(tasks, pos_weights)):
        result[task] = []
        for n, (x, y) in enumerate(zip(logits, labels)):
            valid = not reference.is_missing(y[t], missing)
            loss = reference.bce_with_logits(x[t], y[t], positive) if valid else math.nan
            slope = reference.bce_slope(x[t], y[t], positive) if valid else math.nan
            weight, own = 1.0 if weights is None else weights[n][t], () if cells is None else cells[n][t]
            result[task].append(reference.Row(loss, slope, weight, valid, own))
    return result


def together(parts: Sequence[Columns]) -> Columns:
    """The rows of several steps or ranks."""
    return {task: [row for part in parts for row in part[task]] for task in parts[0]}


def mean_of_means(parts: Sequence[Columns], rule: reference.Rule) -> dict[str, float]:
    """What is reported where the losses of steps or ranks are averaged, each over the parts that have some."""
    losses = [reference.losses(part, rule) for part in parts]
    return {key: statistics.fmean(x for loss in losses if not math.isnan(x := loss[key])) for key in losses[0]}


class Truth(NamedTuple):
    """One process by hand."""

    results: dict[str, float]
    averaged: dict[str, float]
    """The mean of the last epoch's steps."""


def truth_of(example: Any, epochs: int, rule: reference.Rule, missing: float | None = None) -> Truth:
    """What an example that trains, and then evaluates, has to find after its last epoch."""
    torch.manual_seed(0)
    data, held_out = (
        Rows.of(*example.rows(count, seed)) for count, seed in ((example.TRAIN_ROWS, 1), (example.EVAL_ROWS, 2))
    )
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=missing, rule=rule)
    seen: list[Columns] = []
    for _ in range(epochs):
        seen = [ranker.step(batch) for batch in data.batches(example.GLOBAL_BATCH)]
    modes = {"train": reference.losses(together(seen), rule), "eval": ranker.losses(held_out)}
    results = {f"{mode}/{key}": value for mode, losses in modes.items() for key, value in losses.items()}
    return Truth(results, mean_of_means(seen, rule))


Curves = dict[str, list[tuple[int, float]]]
"""The points of each key: the number of steps done, and the value."""


def curves_of(example: Any, epochs: int) -> dict[str, Curves]:
    """What an example that logs after each epoch has to log, by mode."""
    torch.manual_seed(0)
    data, held_out = (
        Rows.of(*example.rows(count, seed)) for count, seed in ((example.TRAIN_ROWS, 1), (example.EVAL_ROWS, 2))
    )
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=example.MISSING)
    curves: dict[str, Curves] = {"train": {}, "eval": {}}
    step = 0
    for _ in range(epochs):
        seen = [ranker.step(batch) for batch in data.batches(example.GLOBAL_BATCH)]
        step += len(seen)
        points = {"train": reference.losses(together(seen), reference.Rule()), "eval": ranker.losses(held_out)}
        for mode, losses in points.items():
            for key, value in losses.items():
                curves[mode].setdefault(key, []).append((step, value))
    return curves
