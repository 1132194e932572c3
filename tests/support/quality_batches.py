"""Batches for the ranking quality, from a seed and as the rows that the oracle takes; and the metrics they go to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support import quality_reference
from tests.support.quality_reference import Impression
from tests.support.reference import is_missing
from tests.support.results import numbers
from twloss import Loss, MultiTaskLoss, RankingQuality

TASKS = ["like", "reply", "share"]


class Rows(NamedTuple):
    """Logits, labels and weights ``(rows, tasks)``: what update() takes."""

    logits: Tensor
    labels: Tensor
    weights: Tensor | None = None


def random_rows(
    rows: int,
    seed: int = 0,
    *,
    tasks: int = len(TASKS),
    soft: bool = False,
    weighted: bool = False,
    missing: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Logits of -6 to 6, one label in four positive, and some weights of 0 and labels missing where they may be."""
    generator = torch.Generator().manual_seed(seed)

    def rand() -> Tensor:
        return torch.rand(rows, tasks, generator=generator, dtype=torch.float64)

    logits, labels = 12 * rand() - 6, rand()
    if not soft:
        labels = (labels < 0.25).double()
    if missing is not None:
        labels[rand() < 0.3] = missing
    weights = 4 * rand() * (rand() < 0.8) if weighted else None
    return Rows(logits.to(dtype), labels.to(dtype), None if weights is None else weights.to(dtype))


def columns(
    batches: Iterable[Rows], tasks: Sequence[str] = TASKS, missing: float | None = None
) -> dict[str, list[Impression]]:
    """All rows of each task in Python floats, without the missing ones."""
    rows: dict[str, list[Impression]] = {task: [] for task in tasks}
    for batch in batches:
        weights = torch.ones(batch.labels.shape) if batch.weights is None else batch.weights
        parts = [p.detach().double().reshape(-1, len(tasks)).T.tolist() for p in (batch.logits, batch.labels, weights)]
        for task, x, y, w in zip(tasks, *parts):
            rows[task] += [row for row in zip(x, y, w) if not is_missing(row[1], missing)]
    return rows


def expected(batches: Iterable[Rows], tasks: Sequence[str] = TASKS, missing: float | None = None) -> dict[str, float]:
    """What the oracle makes of all rows."""
    return quality_reference.result(columns(batches, tasks, missing))


def recent(values: Mapping[str, float], *, window: bool) -> dict[str, float]:
    """Of a result with a window, the part of the window with its keys as for all updates, or the part of these."""
    return {k.removeprefix("window_"): v for k, v in values.items() if k.startswith("window_") == window}


def one_task(logits: Any, labels: Any, weights: Any = None) -> dict[str, float]:
    """The numbers of one batch of one task, from lists or tensors, in float64."""
    metric = RankingQuality(None)
    metric.update(*(torch.as_tensor(x, dtype=torch.float64) for x in (logits, labels, weights) if x is not None))
    return numbers(metric.compute())


def attached(quality: bool | RankingQuality = True, **options: Any) -> MultiTaskLoss:
    """A loss of the three tasks with a quality."""
    return MultiTaskLoss("bce_with_logits", TASKS, quality=quality, **options)


def train_and_eval(loss: MultiTaskLoss | Loss) -> tuple[RankingQuality, RankingQuality]:
    """The quality metrics of a loss that has them."""
    return loss.train_quality, loss.eval_quality
