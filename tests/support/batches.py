"""Random batches: of every dtype and layout, as tensors or mappings, with a fault or none; and the oracle's view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support import reference
from tests.support.cases import Settings

INPUTS = ("logits", "labels", "weights")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.bool, torch.uint8, torch.uint16)
NOT_FINITE = (math.nan, math.inf, -math.inf)
TOO_MANY = 7
"""More rows than any batch has, and not a size that broadcasts to one."""

Values = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What a batch looks like."""

    shape: tuple[int, ...]
    """Of the labels: (rows, tasks), or any of a one-task loss."""
    classes: int | None
    dtypes: dict[str, torch.dtype | None]
    layouts: dict[str, str]
    expanded: bool
    """All rows are the first one, in the same memory."""
    mappings: frozenset[str]
    weights_shape: tuple[int, ...]
    not_finite: tuple[str, float] | None
    """One value of an input, if its dtype holds it."""
    junk: float
    """The logits and labels of weight 0."""
    requires_grad: bool
    seed: int


@st.composite
def kinds(draw: st.DrawFn, tasks: int | None) -> Kind:
    """Kinds of batches, for so many tasks or for a one-task loss."""
    rows = draw(st.sampled_from((1, 2, 5, 5, 0)))
    classes = draw(st.none() | st.integers(1, 4))
    # A single loss takes class logits by row alone.
    further = () if classes else draw(st.sampled_from(((), (1,), (3,), (2, 2))))
    shape = (rows, *further) if tasks is None else (rows, tasks)
    labels = (*SIGNED, *UNSIGNED) if classes else (*SIGNED, *UNSIGNED, *FLOATS)
    return Kind(
        shape,
        classes,
        {
            "logits": draw(st.sampled_from(FLOATS)),
            "labels": draw(st.sampled_from(labels)),
            "weights": draw(st.none() | st.sampled_from((*SIGNED, *UNSIGNED, *FLOATS))),
        },
        {name: draw(st.sampled_from(("contiguous", "transposed", "strided"))) for name in INPUTS},
        draw(st.integers(0, 4)) == 4,
        frozenset() if tasks is None else draw(st.frozensets(st.sampled_from(INPUTS))),
        draw(st.sampled_from((shape, (*shape[:-1], 1), () if tasks is None else (rows,)))),
        draw(st.none() | st.tuples(st.sampled_from(INPUTS), st.sampled_from(NOT_FINITE))),
        draw(st.sampled_from((0.0, *NOT_FINITE))),
        draw(st.booleans()),
        draw(st.integers(0, 2**31)),
    )


def batch_of(kind: Kind, settings: Settings) -> dict[str, Any]:
    """The inputs, without a fault."""
    generator = torch.Generator().manual_seed(kind.seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    dtype = kind.dtypes["labels"]
    weights = 8 * rand(*kind.weights_shape) * (rand(*kind.weights_shape) < 0.7)
    if kind.classes is None:
        logits = 16 * rand(*kind.shape) - 8
        labels = rand(*kind.shape) if dtype in FLOATS else rand(*kind.shape).round()
    else:
        logits = 16 * rand(*kind.shape, kind.classes) - 8
        labels = (min(kind.classes, 2 if dtype == torch.bool else kind.classes) * rand(*kind.shape)).floor()
    values = {"logits": logits, "labels": labels, "weights": weights}
    if kind.not_finite is not None and kind.dtypes[kind.not_finite[0]] in FLOATS:
        flat = values[kind.not_finite[0]].view(-1)
        flat[kind.seed % max(len(flat), 1) :][:1] = kind.not_finite[1]
    if kind.dtypes["weights"] is not None:
        out = full(weights.to(kind.dtypes["weights"]), kind) == 0
        logits[out] = kind.junk
        labels[out] = kind.junk if dtype in FLOATS else -100.0 if dtype in SIGNED else 0.0
    if settings.ignore_index is not None and _holds(dtype, settings.ignore_index):
        labels[rand(*kind.shape) < 0.3] = settings.ignore_index
    return {name: _as_input(name, value, kind, settings) for name, value in values.items()}


def full(weights: Tensor, kind: Kind) -> Tensor:
    """Weights in the labels' shape."""
    return (weights.unsqueeze(1) if kind.weights_shape == kind.shape[:1] != kind.shape else weights).expand(kind.shape)


def _holds(dtype: torch.dtype | None, value: float) -> bool:
    return dtype in FLOATS or (dtype in SIGNED and math.isfinite(value))


def _as_input(name: str, value: Tensor, kind: Kind, settings: Settings) -> Any:
    dtype = kind.dtypes[name]
    if dtype is None:
        return None
    value = value.to(dtype)
    if name == "logits" and kind.requires_grad:
        value.requires_grad_()
    if value.ndim and kind.expanded:
        value = value[:1].expand_as(value)
    elif value.ndim and kind.layouts[name] == "transposed":
        value = value.movedim(0, -1).contiguous().movedim(-1, 0)
    elif value.ndim and kind.layouts[name] == "strided":
        value = value.repeat_interleave(2, 0)[::2]
    if name not in kind.mappings:
        return value
    columns = (full(value, kind) if name == "weights" else value).unbind(1)
    wide = kind.seed % 2 == 1 and not (name == "logits" and kind.classes)
    return {task: column.unsqueeze(1) if wide else column for task, column in zip(settings.names(), columns)}


@dataclass(frozen=True)
class Column:
    """One task's rows as the oracle sees them."""

    rows: list[reference.Row]
    magnitude: float
    """The sum over rows of weight times the largest number that the loss is computed from."""

    def is_finite(self) -> bool:
        """Whether all that counts is."""
        return all(math.isfinite(row.weight * row.loss) for row in self.rows if row.valid and row.weight != 0)


def columns_of(batch: Mapping[str, Any], kind: Kind, settings: Settings) -> dict[str, Column]:
    """The rows of each task."""
    tasks = settings.tasks
    weights = batch["weights"]
    if isinstance(weights, Tensor):
        weights = full(weights, kind)
    result = {}
    for t, name in enumerate(settings.names()):
        logits = numbers_of(batch["logits"], t, name, tasks, kind.classes)
        labels = numbers_of(batch["labels"], t, name, tasks, None)
        factors = [1.0] * len(labels) if weights is None else numbers_of(weights, t, name, tasks, None)
        positive = settings.pos_weights[t] if settings.pos_weights else 1.0
        rows, magnitude = [], 0.0
        for x, y, w in zip(logits, labels, factors):
            missing = settings.ignore_index
            valid = missing is None or not (y == missing or (math.isnan(y) and math.isnan(missing)))
            loss = math.nan
            if valid and w != 0:
                loss = reference.cross_entropy(x, int(y)) if kind.classes else reference.bce_with_logits(x, y, positive)
                sizes = map(abs, x) if kind.classes else [abs(x) * (1 + positive)]
                # At an infinite logit the loss is its limit, to the last bit.
                magnitude += abs(w) * max(abs(loss), *(size for size in sizes if math.isfinite(size)), 0.0)
            rows.append(reference.Row(loss, weight=w, valid=valid))
        result[name] = Column(rows, magnitude)
    return result


def numbers_of(values: Values, t: int, task: str, tasks: int, classes: int | None) -> list[Any]:
    """One task's values as Python floats, or lists of them for classes."""
    if isinstance(values, Tensor):
        values = values.reshape(-1, *([tasks] if classes is None else [tasks, classes]))[:, t]
    else:
        values = values[task]
    numbers: list[Any] = values.detach().double().reshape(len(values), *([] if classes is None else [classes])).tolist()
    return numbers


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda _: None,
    "list": lambda value: value.tolist(),
    "array": lambda value: value.detach().double().numpy(),
    "number": lambda _: 1.0,
    "complex": lambda value: value.to(torch.complex64),
    "meta": lambda value: value.to("meta"),
    "dimensions": lambda value: value[(None,) * 5],
    "rows": lambda value: value.new_zeros((TOO_MANY, *value.shape[1:])),
    "dtype": lambda value: value.to(torch.int64 if value.is_floating_point() else torch.float32),
}


def faulty(batch: dict[str, Any], kind: Kind, settings: Settings) -> Iterator[dict[str, Any]]:
    """The batch with each fault that an input of its kind may have, one at a time."""
    for name in INPUTS:
        value, faults = batch[name], dict(FAULTS)
        if value is None:
            continue
        if name == "weights" or (name == "labels" and kind.classes is None):
            del faults["dtype"]
        if isinstance(value, Mapping):
            task, other = settings.names()[kind.seed % settings.tasks], {"other": torch.zeros(kind.shape[0])}
            without = {key: column for key, column in value.items() if key != task}
            wrong: list[Any] = [{}, without, {**value, **other}, {**without, **other}]
            wrong += [{**value, task: fault(value[task])} for fault in faults.values()]
        else:
            wrong = [fault(value) for key, fault in faults.items() if not (name == "weights" and key == "none")]
        yield from ({**batch, name: item} for item in wrong)
