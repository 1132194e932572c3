"""The oracle of examples/torchrec_ranker.py: the same ranker in one process, by hand, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support import reference
from tests.support.by_hand import Columns, HandRanker, Rows
from tests.support.rank_pool import RankPool

Answer = TypeVar("Answer")

RULE = reference.Rule()
POS_WEIGHTS = [1.0, 27.3, 4.0]
Ids = dict[str, list[list[int]]]


class Truth(NamedTuple):
    """What is trained, and what was seen on the way."""

    steps: list[Columns]
    """Each step's rows by task, as they were before it."""
    impressions: list[dict[str, list[tuple[float, float, float]]]]
    """Each step's logits, labels and weights by task."""
    parameters: dict[str, list[list[float]]]
    """After the last step."""


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_ranks(
    world_size: int, request: pytest.FixtureRequest, function: Callable[..., Answer], *args: Any
) -> list[Answer]:
    """Call ``function(rank, *args)`` in a process group of this process, or on each of two ranks; the results."""
    if world_size == 1:
        with one_process():
            return [function(0, *args)]
    pool: RankPool = request.getfixturevalue("two_ranks")
    return pool.run(function, *args)


def train_by_hand(example: Any) -> Truth:
    """One epoch of gradient descent on the global batches."""
    torch.manual_seed(0)
    heads: nn.Linear = example.Ranker().heads
    ranker = HandRanker(heads, example.TASKS, learning_rate=example.LEARNING_RATE, pos_weights=POS_WEIGHTS)
    tables: dict[str, list[list[float]]] = {
        name: example.init_table(torch.empty(size, example.DIM), seed=size).double().tolist()
        for name, size in example.TABLES.items()
    }
    steps, impressions = [], []
    for batch in example.batches(0, 1):
        ids = ids_of(batch.ids, len(batch.labels))
        rows = Rows.of(with_pooled(batch.dense.double().tolist(), ids, tables), batch.labels, batch.weights)
        columns = ranker.columns(rows)
        impressions.append(seen_of(ranker, rows))
        step_tables(ranker, tables, ids, columns, example.DENSE)
        steps.append(ranker.step(rows))
    parameters = {"heads.weight": ranker.matrix, "heads.bias": [ranker.bias]}
    return Truth(steps, impressions, {**parameters, **tables})


def ids_of(ids: Any, rows: int) -> Ids:
    """Each row's ids in each table."""
    found: Ids = {}
    values, lengths = iter(ids.values().tolist()), iter(ids.lengths().tolist())
    for name in ids.keys():  # noqa: SIM118 (no mapping)
        found[name] = [[next(values) for _ in range(next(lengths))] for _ in range(rows)]
    return found


def with_pooled(dense: list[list[float]], ids: Ids, tables: dict[str, list[list[float]]]) -> torch.Tensor:
    """The numbers, then each table's entries, summed."""
    pooled = [
        [math.fsum(table[i][k] for i in ids[name][n]) for name, table in tables.items() for k in range(len(table[0]))]
        for n in range(len(dense))
    ]
    return torch.tensor([[*numbers, *sums] for numbers, sums in zip(dense, pooled)], dtype=torch.float64)


def seen_of(ranker: HandRanker, rows: Rows) -> dict[str, list[tuple[float, float, float]]]:
    """Logits, labels and weights by task."""
    assert rows.weights is not None
    parts = list(zip(ranker.logits(rows), rows.labels, rows.weights))
    return {task: [(x[t], y[t], w[t]) for x, y, w in parts] for t, task in enumerate(ranker.tasks)}


def step_tables(
    ranker: HandRanker, tables: dict[str, list[list[float]]], ids: Ids, columns: Columns, offset: int
) -> None:
    """Gradient descent on the tables: an entry's gradient is the sum over the rows that have it."""
    slopes = list(reference.gradients(columns, RULE).values())
    for name, table in tables.items():
        for n, entries in enumerate(ids[name]):
            for k in range(len(table[0])):
                slope = math.fsum(slopes[t][n] * ranker.matrix[t][offset + k] for t in range(len(slopes)))
                for i in entries:
                    table[i][k] -= ranker.learning_rate * slope
        offset += len(table[0])
