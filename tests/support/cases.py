"""Random settings and rows for the two laws, and what the oracle makes of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support import reference
from tests.support.by_hand import columns_of
from twloss import MultiTaskLoss

FEATURES = 3
REDUCTIONS = ("mean", "sum", "min", "max", "median", "norm")


def norm(losses: Tensor) -> Tensor:
    """A global reduction that the package does not know."""
    return (1 + losses.square().sum()).sqrt()


class Arguments:
    """What the settings of losses share, whatever their tasks are."""

    fused = False
    segments: Any = None

    loss_type: Any
    task_loss_reduction: Any
    global_reduction: Any
    pos_weights: Any
    task_weights: Sequence[float] | None
    mean_over: Any
    ignore_index: Any

    def names(self) -> list[str]:
        """The tasks' names."""
        raise NotImplementedError

    def loss(self, **kwargs: Any) -> MultiTaskLoss:
        """The loss, without the warning of reductions that are chosen on purpose."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return MultiTaskLoss(
                self.loss_type,
                self.names(),
                self.task_loss_reduction,
                norm if self.global_reduction == "norm" else self.global_reduction,
                None if self.loss_type == "given" else self.pos_weights,
                task_weights=self.task_weights,
                mean_over=self.mean_over,
                ignore_index=self.ignore_index,
                **{"fused": self.fused, "segments": self.segments, **kwargs},
            )

    def rule(self) -> reference.Rule:
        """The oracle's settings."""
        cells = reference.cells_of(self.segments)
        return reference.Rule(
            self.task_loss_reduction, self.global_reduction, self.mean_over, self.task_weights, cells=cells
        )


@dataclass(frozen=True)
class Settings(Arguments):
    """The arguments of a ``MultiTaskLoss``, as values that travel to other processes."""

    tasks: int = 3
    task_loss_reduction: Any = "mean"
    global_reduction: Any = "mean"
    pos_weights: Sequence[float] | None = None
    task_weights: Sequence[float] | None = None
    mean_over: Any = "rows"
    ignore_index: float | None = None
    fused: bool = False
    segments: reference.Segments | None = None
    form: str = "rows"
    """What a ``Ranker`` hands to its loss: "rows"; "sums", for GIVEN tasks; or "mappings" of these, for others."""

    @property
    def loss_type(self) -> str:
        """That of all tasks."""
        return "given" if self.form == "sums" else "bce_with_logits"

    def names(self) -> list[str]:
        """The tasks' names."""
        return [f"task{t}" for t in range(self.tasks)]

    def ranker(self, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Ranker:
        """A model with the loss, which has these further arguments."""
        return Ranker(self.loss(**kwargs), self.tasks, dtype, None if self.form == "rows" else self)


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: features ``(rows, FEATURES)``, labels ``(rows, tasks)`` and weights ``(rows, tasks)``."""

    features: Tensor
    labels: Tensor
    weights: Tensor | None
    ids: dict[str, Tensor] | None = None
    """Of each dimension of segments, ``(rows,)`` or ``(rows, tasks)``."""

    def cut(self, sizes: Sequence[int]) -> list[Rows]:
        """Consecutive parts of these sizes."""
        weights = [None] * len(sizes) if self.weights is None else list(self.weights.split(list(sizes)))
        ids: list[dict[str, Tensor]] = [{} for _ in sizes]
        for name, of_all in (self.ids or {}).items():
            for part, own in zip(ids, of_all.split(list(sizes))):
                part[name] = own.clone()
        return [
            Rows(f.clone(), y.clone(), w if w is None else w.clone(), own or None)
            for f, y, w, own in zip(self.features.split(list(sizes)), self.labels.split(list(sizes)), weights, ids)
        ]

    def to(self, dtype: torch.dtype) -> Rows:
        """The rows in another floating dtype."""
        weights = None if self.weights is None else self.weights.to(dtype)
        return Rows(self.features.to(dtype), self.labels.to(dtype), weights, self.ids)


def split(rows: Rows, sizes: Sequence[Sequence[int]]) -> list[list[Rows]]:
    """All rows in parts, by step, by rank."""
    parts = iter(rows.cut([size for step in sizes for size in step]))
    return [[next(parts) for _ in step] for step in sizes]


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several parts."""
    weights = [part.weights for part in parts if part.weights is not None]
    return Rows(
        torch.cat([part.features for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat(weights) if weights else None,
        {name: torch.cat([part.ids[name] for part in parts if part.ids]) for name in parts[0].ids or {}} or None,
    )


class Ranker(nn.Module):
    """A linear model with its loss as a submodule, of known parameters; it makes the sums of a case of these."""

    def __init__(
        self, loss: MultiTaskLoss, tasks: int, dtype: torch.dtype = torch.float64, case: Settings | None = None
    ) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, tasks, dtype=dtype)
        with torch.no_grad():
            values = torch.arange(tasks * (FEATURES + 1), dtype=dtype).sin().view(tasks, FEATURES + 1)
            self.heads.weight.copy_(values[:, :-1])
            self.heads.bias.copy_(values[:, -1])
        self.loss = loss
        self.case = case

    def forward(self, rows: Rows, normalizer: Tensor | float | None = None) -> dict[str, Tensor]:
        """The losses of the rows."""
        if self.case is not None:
            sums: tuple[Any, Any] = sums_of(self.case, self.heads(rows.features), rows)
            if self.case.form == "mappings":
                sums = dict(zip(self.case.names(), sums[0])), dict(zip(reversed(self.case.names()), sums[1].flip(0)))
            return self.loss.from_sums(*sums, normalizer=normalizer)
        losses: dict[str, Tensor] = self.loss(
            self.heads(rows.features), rows.labels, rows.weights, normalizer=normalizer, segments=rows.ids
        )
        return losses


def sums_of(case: Settings, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Σ w·l of each task and what its mean divides by, ``(tasks,)`` each, by torch's own loss."""
    missing = torch.zeros_like(logits, dtype=torch.bool)
    if case.ignore_index is not None:
        missing = rows.labels.isnan() | (rows.labels == case.ignore_index)
    positive = None if case.pos_weights is None else logits.new_tensor(case.pos_weights)
    labels = rows.labels.masked_fill(missing, 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=positive, reduction="none")
    weights = torch.ones_like(logits) if rows.weights is None else rows.weights
    counted = torch.ones_like(weights) if case.mean_over == "rows" else weights
    return (weights * losses).masked_fill(missing, 0.0).sum(0), counted.masked_fill(missing, 0.0).sum(0)


def columns(settings: Settings, rows: Rows) -> dict[str, list[reference.Row]]:
    """The oracle's view of rows that a ``Ranker`` has seen: logits by Python floats too."""
    heads = Ranker(settings.loss(), settings.tasks).heads
    matrix, bias = heads.weight.tolist(), heads.bias.tolist()
    features = rows.features.tolist()
    logits = [[math.fsum([b, *(a * f for a, f in zip(line, x))]) for line, b in zip(matrix, bias)] for x in features]
    weights = None if rows.weights is None else rows.weights.tolist()
    positive = settings.pos_weights or [1.0] * settings.tasks
    cells = cells_of_rows(settings, rows.ids, len(logits))
    return columns_of(logits, rows.labels.tolist(), weights, settings.names(), settings.ignore_index, positive, cells)


def cells_of_rows(settings: Settings, ids: dict[str, Tensor] | None, rows: int) -> list[list[list[str]]]:
    """The cells of each row and task, by ids ``(rows,)``, ``(rows, 1)`` or ``(rows, tasks)``."""
    cells: list[list[list[str]]] = [[[] for _ in range(settings.tasks)] for _ in range(rows)]
    for name, own in (ids or {}).items():
        assert settings.segments is not None
        for of_row, values in zip(
            cells, (own.unsqueeze(1) if own.ndim == 1 else own).expand(rows, settings.tasks).tolist()
        ):
            for of_task, value in zip(of_row, values):
                of_task.append(reference.cell_of(name, settings.segments[name], value))
    return cells


def parameter_gradients(
    settings: Settings, rows: Rows, normalizer: float | None = None
) -> tuple[list[list[float]], list[float]]:
    """The oracle's gradients of the ``Ranker``'s matrix ``(tasks, FEATURES)`` and bias ``(tasks,)``."""
    rule = replace(settings.rule(), normalizer=normalizer)
    slopes = reference.gradients(columns(settings, rows), rule)
    features = rows.features.tolist()
    matrix = [
        [math.fsum(g * x[f] for g, x in zip(grads, features)) for f in range(FEATURES)] for grads in slopes.values()
    ]
    return matrix, [math.fsum(grads) for grads in slopes.values()]


def random_rows(settings: Settings, rows: int, seed: int, *, weighted: bool) -> Rows:
    """Rows with soft labels, weights of 0 among the weights, and missing labels where they may be missing."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    features, labels = 2 * rand(rows, FEATURES) - 1, rand(rows, settings.tasks)
    if settings.ignore_index is not None:
        missing = (rand(rows, settings.tasks) < 0.3) | (rand(1, settings.tasks) < 0.2)
        labels[missing] = settings.ignore_index
    weights = rand(rows, settings.tasks) * (rand(rows, settings.tasks) < 0.8) if weighted else None
    return Rows(features, labels, weights, random_ids(settings, rows, seed))


def random_ids(settings: Settings, rows: int, seed: int) -> dict[str, Tensor] | None:
    """Ids of each dimension, some of which are out of it; by row and task in every other one."""
    generator = torch.Generator().manual_seed(seed)
    ids = {}
    for place, (name, names) in enumerate((settings.segments or {}).items()):
        size = names if isinstance(names, int) else len(names)
        shape = (rows, settings.tasks) if place % 2 else (rows,)
        ids[name] = torch.randint(-1, size + 2, shape, generator=generator)
    return ids or None


def numbers(tasks: int) -> st.SearchStrategy[list[float] | None]:
    """A number for each task, or None."""
    return st.none() | st.lists(st.floats(0.1, 30.0), min_size=tasks, max_size=tasks)


FORMS = ("rows", "sums", "mappings")
SEGMENTS: tuple[reference.Segments | None, ...] = (
    None,
    {"country": ("DE", "US")},
    {"surface": 1, "country": ("DE", "US", "FR")},
    {"task0": 2, "b": ("x",), "loss": 3},
)


@st.composite
def settings_of_all_kinds(draw: st.DrawFn, forms: Sequence[str] = ("rows",)) -> Settings:
    """Every option at random, but for segments."""
    tasks = draw(st.integers(1, 5))
    return Settings(
        tasks,
        draw(st.sampled_from(("mean", "sum"))),
        draw(st.sampled_from(REDUCTIONS)),
        draw(numbers(tasks)),
        draw(numbers(tasks)),
        draw(st.sampled_from(("rows", "weights"))),
        draw(st.sampled_from((None, -1.0, math.nan))),
        form=draw(st.sampled_from(forms)),
    )


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> tuple[Settings, Rows, list[list[int]]]:
    """Settings, all rows, and the sizes of the parts: by step, by rank."""
    settings = draw(settings_of_all_kinds(FORMS))
    if settings.form == "rows":  # sums are of no cell
        settings = replace(settings, segments=draw(st.sampled_from(SEGMENTS)))
    steps = draw(st.integers(1, 4))
    sizes = [[draw(st.integers(0, 7)) for _ in range(world_size)] for _ in range(steps)]
    rows = random_rows(settings, sum(map(sum, sizes)), draw(st.integers(0, 2**31)), weighted=draw(st.booleans()))
    return settings, rows, sizes
