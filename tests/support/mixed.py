"""Tasks of different kinds with rows of their own: random settings and rows, a model of them, and the oracle's view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support import reference
from tests.support.cases import FEATURES, REDUCTIONS, SEGMENTS, Arguments, numbers

CLASSES = {"binary": 1, "squared": 1, "three classes": 3, "five classes": 5, "given": 1}


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    """A regression's loss."""
    return (logits - labels).square()


class Scaled(nn.Module):
    """A regression's loss with a scale that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """((x - y) / s)² + 2 log s."""
        return ((logits - labels) / self.scale).square() + 2 * self.scale.log()


TYPES: dict[str, Any] = {
    "binary": "bce_with_logits",
    "squared": squared,
    "three classes": "cross_entropy",
    "five classes": "cross_entropy",
    "given": "given",  # sums of squares, which a ``Ranker`` makes
}
KINDS_WITH_ROWS = tuple(kind for kind in TYPES if kind != "given")


@dataclass(frozen=True)
class Mixed(Arguments):
    """The arguments of a ``MultiTaskLoss`` whose tasks differ, as values that travel to other processes."""

    kinds: tuple[str, ...]
    """Of each task, a key of ``TYPES``."""
    task_loss_reduction: Any = "mean"
    global_reduction: Any = "mean"
    pos_weights: dict[str, float] | None = None
    task_weights: Sequence[float] | None = None
    mean_over: Any = "rows"
    ignore_index: dict[str, float] | None = None
    weighted: bool = False
    segments: reference.Segments | None = None

    def names(self) -> list[str]:
        """The tasks' names, which no attribute could have."""
        return [f"a.{t} {kind}" for t, kind in enumerate(self.kinds)]

    @property
    def loss_type(self) -> dict[str, Any]:
        """The type of each task."""
        return {task: TYPES[kind] for task, kind in zip(self.names(), self.kinds)}


@dataclass(frozen=True)
class Part:
    """One task's rows: features ``(rows, FEATURES)``, labels and weights ``(rows,)``."""

    features: Tensor
    labels: Tensor
    weights: Tensor | None
    ids: dict[str, Tensor] | None = None
    """Of each dimension of segments."""


Batch = dict[str, Part]


class Ranker(nn.Module):
    """A head a task, of known parameters, and the loss of them all."""

    def __init__(self, case: Mixed, **kwargs: Any) -> None:
        super().__init__()
        self.names = case.names()
        self.given = [task for task, kind in zip(self.names, case.kinds) if kind == "given"]
        self.heads = nn.ModuleList(nn.Linear(FEATURES, CLASSES[kind], dtype=torch.float64) for kind in case.kinds)
        with torch.no_grad():
            for t, parameter in enumerate(self.heads.parameters()):
                parameter.copy_((torch.arange(parameter.numel()) + 7 * t).double().sin().view_as(parameter))
        self.loss = case.loss(**kwargs)

    def forward(self, batch: Batch, normalizer: Tensor | float | None = None) -> dict[str, Tensor]:
        """The losses of a batch."""
        logits = {task: head(batch[task].features) for task, head in zip(self.names, self.heads)}
        given = {task: self.sums_of(logits.pop(task), batch[task]) for task in self.given}
        if not logits:
            sums = {task: loss_sum for task, (loss_sum, _) in given.items()}
            return self.loss.from_sums(sums, {task: w for task, (_, w) in given.items()}, normalizer=normalizer)
        labels = {task: batch[task].labels for task in reversed(self.names) if task in logits}
        weights = {task: batch[task].weights for task in labels if batch[task].weights is not None}
        inputs: Any = (logits, labels, weights or None)
        segments: Any = {
            name: {task: ids[name] for task in labels if (ids := batch[task].ids)} for name in self.loss.segments or {}
        }
        losses: dict[str, Tensor] = self.loss(
            *inputs, normalizer=normalizer, given=given or None, segments=segments or None
        )
        return losses

    def sums_of(self, logits: Tensor, part: Part) -> tuple[Tensor, Tensor | int]:
        """Σ w·l of the rows of a GIVEN task, and what its mean divides by."""
        squares = squared(logits.squeeze(1), part.labels)
        weights = torch.ones_like(squares) if part.weights is None else part.weights
        return (weights * squares).sum(), len(squares) if self.loss.mean_over == "rows" else weights.sum()


def random_batch(case: Mixed, sizes: Sequence[int], seed: int) -> Batch:
    """So many rows of each task, with weights of 0 among the weights, and missing labels where they may be missing."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    batch = {}
    for task, kind, rows in zip(case.names(), case.kinds, sizes):
        labels = (rand(rows) * CLASSES[kind]).long() if "classes" in kind else rand(rows)
        missing = (case.ignore_index or {}).get(task)
        if missing is not None:
            labels = labels.masked_fill(rand(rows) < 0.4, missing)
        weights = rand(rows) * (rand(rows) < 0.8) if case.weighted else None
        features, ids = 2 * rand(rows, FEATURES) - 1, {}
        for name, names in (case.segments or {}).items() if kind != "given" else ():
            size = names if isinstance(names, int) else len(names)
            ids[name] = torch.randint(-1, size + 2, (rows,), generator=generator)
        batch[task] = Part(features, labels, weights, ids or None)
    return batch


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches."""
    return {
        task: Part(
            torch.cat([batch[task].features for batch in batches]),
            torch.cat([batch[task].labels for batch in batches]),
            None if first.weights is None else torch.cat([w for b in batches if (w := b[task].weights) is not None]),
            {name: torch.cat([ids[name] for b in batches if (ids := b[task].ids)]) for name in first.ids or {}} or None,
        )
        for task, first in batches[0].items()
    }


def columns(case: Mixed, batch: Batch) -> dict[str, list[reference.Row]]:
    """The oracle's view of rows that a ``Ranker`` has seen; a slope of 1, to be multiplied by that of each output."""
    return {task: [row for row, _ in rows] for task, rows in _rows(case, batch).items()}


def parameter_gradients(case: Mixed, batch: Batch) -> list[list[float]]:
    """The oracle's gradients of the ``Ranker``'s parameters, flattened, in their order."""
    rows = _rows(case, batch)
    factors = reference.gradients(columns(case, batch), case.rule())
    result = []
    for task, of_task in rows.items():
        outputs = [[factor * slope for slope in slopes] for factor, (_, slopes) in zip(factors[task], of_task)]
        width = CLASSES[case.kinds[case.names().index(task)]]
        features = batch[task].features.tolist()
        result.append(
            [math.fsum(g[c] * x[f] for g, x in zip(outputs, features)) for c in range(width) for f in range(FEATURES)]
        )
        result.append([math.fsum(g[c] for g in outputs) for c in range(width)])
    return result


def _rows(case: Mixed, batch: Batch) -> dict[str, list[tuple[reference.Row, list[float]]]]:
    """Each row, and the derivative of its loss by each output of the head."""
    result: dict[str, list[tuple[reference.Row, list[float]]]] = {}
    heads: list[Any] = list(Ranker(case).heads)
    segments = list((case.segments or {}).items())
    for head, task, kind in zip(heads, case.names(), case.kinds):
        part = batch[task]
        matrix, bias = head.weight.tolist(), head.bias.tolist()
        result[task] = []
        for n, x in enumerate(part.features.tolist()):
            outputs = [math.fsum([b, *(a * v for a, v in zip(line, x))]) for line, b in zip(matrix, bias)]
            label = part.labels[n].item()
            weight = 1.0 if part.weights is None else part.weights[n].item()
            missing = (case.ignore_index or {}).get(task)
            # A GIVEN task is in no cell.
            cells = (
                [reference.cell_of(name, names, int(part.ids[name][n])) for name, names in segments] if part.ids else []
            )
            if reference.is_missing(label, missing):
                row = reference.Row(math.nan, 1.0, weight, valid=False, cells=cells)
                result[task].append((row, [0.0] * len(outputs)))
                continue
            loss, slopes = _row_loss(kind, outputs, label, (case.pos_weights or {}).get(task, 1.0))
            result[task].append((reference.Row(loss, 1.0, weight, cells=cells), slopes))
    return result


def _row_loss(kind: str, outputs: list[float], label: float, pos_weight: float) -> tuple[float, list[float]]:
    if kind == "binary":
        (logit,) = outputs
        return (
            reference.bce_with_logits(logit, label, pos_weight),
            [reference.bce_slope(logit, label, pos_weight)],
        )
    if kind in ("squared", "given"):
        return (outputs[0] - label) ** 2, [2 * (outputs[0] - label)]
    total = math.fsum(map(math.exp, outputs))
    slopes = [math.exp(x) / total - (c == label) for c, x in enumerate(outputs)]
    return reference.cross_entropy(outputs, int(label)), slopes


@st.composite
def mixed_cases(
    draw: st.DrawFn, world_size: int, of_kinds: Sequence[str] = KINDS_WITH_ROWS
) -> tuple[Mixed, list[list[Batch]]]:
    """Settings, and the batches by step, by rank; a task's rows are as many as they happen to be."""
    kinds = tuple(draw(st.lists(st.sampled_from(of_kinds), min_size=1, max_size=5)))
    names = Mixed(kinds).names()
    binary = [task for task, kind in zip(names, kinds) if kind == "binary"]
    some = st.dictionaries(st.sampled_from(binary), st.floats(0.1, 30.0)) if binary else st.nothing()
    labels = {
        task: draw(st.sampled_from((None, -1.0) if "classes" in kind else (None, -1.0, 7.5, math.nan)))
        for task, kind in zip(names, kinds)
        if kind != "given"
    }
    case = Mixed(
        kinds,
        draw(st.sampled_from(("mean", "sum"))),
        draw(st.sampled_from(REDUCTIONS)),
        draw(st.none() | some),
        draw(numbers(len(kinds))),
        draw(st.sampled_from(("rows", "weights"))),
        draw(st.just({task: label for task, label in labels.items() if label is not None}) | st.none()),
        draw(st.booleans()),
        # Where all are GIVEN, sums are of no cell.
        draw(st.sampled_from(SEGMENTS)) if set(kinds) != {"given"} else None,
    )
    sizes = st.just([0] * len(kinds)) | st.lists(st.integers(0, 4), min_size=len(kinds), max_size=len(kinds))
    steps = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    return case, [
        [random_batch(case, draw(sizes), seed + world_size * step + rank) for rank in range(world_size)]
        for step in range(steps)
    ]
