"""Every kind of metric, for what all of them promise: how to make one, what to feed it, and the oracle's result.

A ``Kind`` is made of plain values, so that it travels to ranks; a batch is what update() takes, as a tuple of tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support import quality_reference, reference
from tests.support.quality_batches import Rows, columns, random_rows
from tests.support.results import assert_close, numbers
from twloss import GlobalLoss, RankingQuality, compute_all

Batch = tuple[Tensor, ...]
Summing = GlobalLoss | RankingQuality
Ask = Callable[[Summing], dict[str, Tensor]]
Dimensions = tuple[tuple[str, tuple[str, ...] | int], ...]
"""The segments, in a form that can be hashed."""

SEGMENTS: Dimensions = (("country", ("DE", "US")), ("surface", 3))


class QualityBySegments(RankingQuality):
    """With ids that are made of the logits, so that its batches are tuples of tensors, as those of the others.

    A country is one of a row, and a surface one of a row and task.
    """

    def _sum_batch(self, logits: Any, labels: Any, weights: Any = None, *, segments: Any = None) -> Any:
        ids = {}
        for place, name in enumerate(self.segments or ()):
            of_row = logits[:, 0] if place == 0 and self.tasks else logits
            number = (of_row.detach() / 2 + place).floor().nan_to_num(-1.0)
            ids[name] = number.clamp(-9, 9).long()
        return super()._sum_batch(logits, labels, weights, segments=ids or segments)


def cells_of(segments: Dimensions) -> list[str]:
    """The names of the cells."""
    named = {name: range(ids) if isinstance(ids, int) else ids for name, ids in segments}
    return [f"{name}={each}" for name, ids in named.items() for each in (*ids, "other")]


def cells_of_row(segments: Dimensions, logits: Sequence[float], task: int) -> list[str]:
    """Those that a row of a task is in, by the rule of ``QualityBySegments``."""
    found = []
    for place, (name, ids) in enumerate(segments):
        logit = logits[0 if place == 0 else task]
        number = math.floor(logit / 2 + place) if math.isfinite(logit) else -1
        names = [str(each) for each in range(ids)] if isinstance(ids, int) else ids
        found.append(f"{name}={names[number] if 0 <= number < len(names) else 'other'}")
    return found


@dataclass(frozen=True)
class Kind:
    """A class of metric with the arguments that decide what its sums are of."""

    of: type[GlobalLoss] | type[RankingQuality]
    tasks: tuple[str, ...] | None = ("like", "reply", "share")
    window: int | None = None
    window_rows: int | None = None
    segments: Dimensions | None = None

    def make(self, **options: Any) -> Summing:
        """A new metric, with further arguments."""
        segments = None if self.segments is None else dict(self.segments)
        own = {"window": self.window, "window_rows": self.window_rows, "segments": segments}
        return self.of(self.tasks, **{**{name: value for name, value in own.items() if value}, **options})

    def names(self) -> tuple[str, ...]:
        """The tasks' names in a warning."""
        return self.tasks or ("loss",)

    def batch(self, seed: int, rows: int | None = None) -> Batch:
        """A float64 batch from a seed, weighted; where it has no rows, all of its sums are 0."""
        rows = 12 + seed % 7 if rows is None else rows
        if self.of is GlobalLoss:
            return self._sums(seed, rows)
        parts = random_rows(rows, seed, tasks=len(self.names()), weighted=True)
        return tuple(part if self.tasks else part[:, 0] for part in parts if part is not None)

    def batches(self, count: int, seed: int = 0) -> list[Batch]:
        """So many batches, each of another size."""
        return [self.batch(seed + step) for step in range(count)]

    def _sums(self, seed: int, rows: int) -> Batch:
        """Those of all rows, and of cells each by itself: what is in no oracle need not add up."""
        generator = torch.Generator().manual_seed(seed)
        cells = len(cells_of(self.segments or ()))
        shape = 2, 1 + cells, len(self.names())
        loss_sum, weight = torch.rand(shape, dtype=torch.float64, generator=generator)
        weight = rows * (weight + 0.1)
        if self.tasks:
            # In three batches of five, one of the tasks has no data.
            weight[:, (torch.arange(len(self.tasks)) + seed) % 5 == 0] = 0.0
        loss_sum = weight * 4 * loss_sum
        own = (slice(None) if cells else 0, slice(None) if self.tasks else 0)
        return loss_sum[own], weight[own]

    def changed(self, batch: Batch, part: int, value: float) -> Batch:
        """The batch with a value in one of update()'s arguments, in the first row of the last task; the row counts."""
        parts = [part.clone() for part in batch]
        parts[-1].view(-1, len(self.names()))[0, -1] = 1.0
        parts[part].view(-1, len(self.names()))[0, -1] = value
        if part == 0 and self.of is not GlobalLoss:
            # Against the other label: an infinite logit that is right has a log loss of 0.
            parts[1].view(-1, len(self.names()))[0, -1] = float(value < 0)
        return tuple(parts)

    def without_last_task(self, batch: Batch) -> Batch:
        """The batch with no data of the last task."""
        parts = [part.clone() for part in batch]
        for part in parts if self.of is GlobalLoss else parts[-1:]:
            part.view(-1, len(self.names()))[:, -1] = 0.0
        return tuple(parts)

    def expected(self, *ranks: Sequence[Batch], of: int | None = None) -> dict[str, float]:
        """The oracle's result of the batches of one rank, or of each of several, of so many that there were."""
        result = self._oracle(batch for rank in ranks for batch in rank)
        if not (self.window or self.window_rows):
            return result
        recent = self._oracle(batch for rank in ranks for batch in self.latest(rank, of or len(ranks)))
        return {**result, **{f"window_{key}": value for key, value in recent.items()}}

    def latest(self, batches: Sequence[Batch], ranks: int, after: Sequence[Batch] = (), ranks_after: int = 1) -> Any:
        """Those of one of so many ranks that the window has, after more of them on one of other ranks."""
        if self.window:
            left = max(0, self.window - len(after))
            return batches[-left:] if left else []
        found, rows = [], sum(len(batch[0]) for batch in after) * ranks_after
        for batch in reversed(batches):
            if rows < (self.window_rows or 0):
                found.append(batch)
            rows += len(batch[0]) * ranks
        return found[::-1]

    def without_windows(self) -> Kind:
        """The same of all updates alone."""
        return replace(self, window=None, window_rows=None)

    def _oracle(self, batches: Iterable[Batch]) -> dict[str, float]:
        batches = list(batches)
        if self.of is GlobalLoss:
            result = self._losses([tuple(self._row_of(part, 0) for part in batch) for batch in batches])
            for row, cell in enumerate(cells_of(self.segments or ()), start=1):
                of_cell = self._losses([tuple(self._row_of(part, row) for part in batch) for batch in batches])
                result |= {f"{key}/{cell}": value for key, value in of_cell.items()}
            return result
        rows = columns((Rows(*batch) for batch in batches), self.names())
        rows |= self._rows_of_cells(batches)
        if self.tasks:
            return quality_reference.result(rows)
        named = quality_reference.result({name.removeprefix("loss"): each for name, each in rows.items()})
        return {key.replace("//", "/").removesuffix("/"): value for key, value in named.items()}

    def _row_of(self, sums: Tensor, row: int) -> Tensor:
        """All rows' sums of the tasks, or those of a cell."""
        return sums[row] if self.segments else sums

    def _rows_of_cells(self, batches: Iterable[Batch]) -> dict[str, list[quality_reference.Impression]]:
        segments = self.segments or ()
        found: dict[str, list[quality_reference.Impression]] = {
            f"{name}/{cell}": [] for cell in cells_of(segments) for name in self.names()
        }
        for batch in batches:
            for x, y, w in zip(*(part.detach().double().reshape(-1, len(self.names())).tolist() for part in batch)):
                for task, name in enumerate(self.names()):
                    for cell in cells_of_row(segments, x, task):
                        found[f"{name}/{cell}"].append((x[task], y[task], w[task]))
        return found

    def _losses(self, batches: list[Batch]) -> dict[str, float]:
        """Of given sums: a row of weight n and loss s/n has the sums s and n."""
        rows: dict[str, list[reference.Row]] = {name: [] for name in self.names()}
        for batch in batches:
            for name, s, n in zip(rows, *(part.reshape(-1).tolist() for part in batch)):
                rows[name] += [reference.Row(s / n, weight=n)] if n else []
        losses = reference.losses(rows, reference.Rule(mean_over="weights"))
        return losses if self.tasks else {"loss": losses["loss"]}

    def strangers(self) -> dict[str, Kind]:
        """Kinds whose sums are of something else."""
        others = {name: kind for name, kind in KINDS.items() if kind != self}
        if self.tasks:
            others["other names"] = replace(self, tasks=("a", "b", "c"))
            others["another order"] = replace(self, tasks=self.tasks[::-1])
            others["fewer tasks"] = replace(self, tasks=self.tasks[:2])
        if self.window:
            others["another window"] = replace(self, window=self.window + 1)
        if self.window_rows:
            others["another window"] = replace(self, window_rows=self.window_rows + 1)
        if self.segments:
            first, second = self.segments
            others["other segments"] = replace(self, segments=(("country", ("DE", "FR")), second))
            others["segments in another order"] = replace(self, segments=(second, first))
            others["no segments"] = replace(self, segments=None)
        return others


KINDS = {
    "losses": Kind(GlobalLoss),
    "loss of one task": Kind(GlobalLoss, None),
    "qualities": Kind(RankingQuality),
    "quality of one task": Kind(RankingQuality, None),
    "qualities with a window": Kind(RankingQuality, window=2),
    "qualities with a window of rows": Kind(RankingQuality, window_rows=40),
    "losses by segments": Kind(GlobalLoss, segments=SEGMENTS),
    "loss of one task by segments": Kind(GlobalLoss, None, segments=SEGMENTS),
    "qualities by segments": Kind(QualityBySegments, segments=SEGMENTS),
    "quality of one task by segments": Kind(QualityBySegments, None, segments=SEGMENTS),
    "qualities by segments with a window": Kind(QualityBySegments, window=2, segments=SEGMENTS),
}

KEY = "sums._extra_state"
"""A persistent metric's entry in its state_dict."""


def persistent(kind: Kind, **options: Any) -> Summing:
    """A new metric whose sums are saved."""
    metric = kind.make(**options)
    metric.persistent(True)
    return metric


of_every_kind: Callable[[Any], Any] = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def by_itself(metric: Summing) -> dict[str, Tensor]:
    """A metric's result, from the metric."""
    return metric.compute()


def jointly(metric: Summing) -> dict[str, Tensor]:
    """The same from the call for any number of metrics."""
    return compute_all(metric)


either_way: Callable[[Any], Any] = pytest.mark.parametrize("ask", [by_itself, jointly])


def expect_result_of(kind: Kind, metric: Summing, *ranks: Sequence[Batch], of: int | None = None) -> None:
    """What a metric gives is the oracle's of all of these batches."""
    assert_close(numbers(metric.compute()), kind.expected(*ranks, of=of))


def numbers_of_this_rank(metric: Summing) -> dict[str, float]:
    """The result of this rank's own sums, without a collective."""
    is_distributed, metric.distributed_available_fn = metric.distributed_available_fn, lambda: False
    try:
        return numbers(metric.compute())
    finally:
        metric.distributed_available_fn = is_distributed


def weights_of(metric: GlobalLoss) -> list[float]:
    """The weights that its sums have, task by task: what a loss without a weight, of each rank, adds to the means."""
    more, added = copy.deepcopy(metric), 2.0**50
    more.update(torch.full((len(metric.tasks or "1"),), added, dtype=torch.float64, device=metric.device), 0)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    before, after = numbers(metric.compute()), numbers(more.compute())
    keys = [key for key in before if key != "loss" or metric.tasks is None]
    return [ranks * added / (after[key] - before[key]) for key in keys]
