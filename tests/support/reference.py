"""The oracle: what one process would compute from all rows at once, in Python floats and loops.

It imports nothing of the package, nor of torch, and follows the definitions word by word. Rows come as lists, one per
task and row; sums are ``math.fsum``, which rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Segments = Mapping[str, Sequence[str] | int]
"""Of each dimension the names of its ids, or their number."""


def softplus(z: float) -> float:
    """log(1 + exp(z)) without overflow."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def bce_with_logits(logit: float, label: float, pos_weight: float = 1.0) -> float:
    """-p·y·log σ(x) - (1-y)·log(1 - σ(x)); at an infinite logit the limit."""
    terms = (pos_weight * label, softplus(-logit)), (1.0 - label, softplus(logit))
    return sum(factor * z for factor, z in terms if factor != 0 or math.isfinite(z) or math.isnan(z))


def cross_entropy(logits: Sequence[float], label: int) -> float:
    """-log softmax(x)[c]."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[label]


def bce_slope(logit: float, label: float, pos_weight: float = 1.0) -> float:
    """d/dx of bce_with_logits: (1-y)·σ(x) - p·y·σ(-x)."""
    return (1.0 - label) * sigmoid(logit) - pos_weight * label * sigmoid(-logit)


def sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)) without overflow."""
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def is_missing(label: float, ignore_index: float | None) -> bool:
    """Whether a label is the one that says so."""
    if ignore_index is None:
        return False
    return math.isnan(label) if math.isnan(ignore_index) else label == ignore_index


@dataclass(frozen=True)
class Row:
    """One row of one task."""

    loss: float
    """Unreduced; may be anything where ``weight`` is 0 or ``valid`` is False."""
    slope: float = 0.0
    """The derivative of ``loss`` by the logit."""
    weight: float = 1.0
    valid: bool = True
    cells: Sequence[str] = ()
    """Those that it is in, one a dimension."""


@dataclass(frozen=True)
class Rule:
    """How rows become losses."""

    task_loss_reduction: str = "mean"
    global_reduction: str = "mean"
    """"norm" stands for a callable: √(1 + Σ L_t²), where a task without data counts as a loss of 0."""
    mean_over: str = "rows"
    task_weights: Sequence[float] | None = None
    normalizer: float | None = None
    cells: Sequence[str] = ()
    """Those that have results of their own, of the rows that are in them."""


def losses(columns: dict[str, list[Row]], rule: Rule) -> dict[str, float]:
    """``{"loss/<task>": …, "loss": …}`` of the rows of each task; NaN where there is no data."""
    values = [_task_loss(rows, rule) for rows in columns.values()]
    result = {f"loss/{task}": value for task, value in zip(columns, values)}
    result["loss"] = _global_loss([f * v for f, v in zip(_factors(rule, len(values)), values)], rule.global_reduction)
    for cell in rule.cells:
        own = {task: [row for row in rows if cell in row.cells] for task, rows in columns.items()}
        result |= {f"{key}/{cell}": value for key, value in losses(own, replace(rule, cells=())).items()}
    return result


def cells_of(segments: Segments | None) -> list[str]:
    """The names of all cells, in order."""
    return [cell_of(name, ids, id_) for name, ids in (segments or {}).items() for id_ in range(_count(ids) + 1)]


def cell_of(name: str, ids: Sequence[str] | int, id_: int) -> str:
    """The cell of a dimension that a row with this id is in."""
    if not 0 <= id_ < _count(ids):
        return f"{name}=other"
    return f"{name}={id_ if isinstance(ids, int) else ids[id_]}"


def _count(ids: Sequence[str] | int) -> int:
    return ids if isinstance(ids, int) else len(ids)


def gradients(columns: dict[str, list[Row]], rule: Rule) -> dict[str, list[float]]:
    """The derivative of "loss" by the logits, for each task's rows."""
    values = [_task_loss(rows, rule) for rows in columns.values()]
    factors = _factors(rule, len(values))
    slopes = _global_slopes([f * v for f, v in zip(factors, values)], rule.global_reduction)
    result = {}
    for (task, rows), factor, slope in zip(columns.items(), factors, slopes):
        divisor = _weight(rows, rule) if rule.task_loss_reduction == "mean" else 1.0
        result[task] = [
            slope * factor * row.weight * row.slope / divisor if row.valid and row.weight != 0 and divisor else 0.0
            for row in rows
        ]
    return result


def _factors(rule: Rule, tasks: int) -> Sequence[float]:
    return rule.task_weights or [1.0] * tasks


def _weight(rows: Sequence[Row], rule: Rule) -> float:
    if rule.normalizer is not None:
        return rule.normalizer
    valid = [row for row in rows if row.valid]
    return float(len(valid)) if rule.mean_over == "rows" else math.fsum(row.weight for row in valid)


def _task_loss(rows: Sequence[Row], rule: Rule) -> float:
    loss_sum = math.fsum(row.weight * row.loss for row in rows if row.valid and row.weight != 0)
    weight = _weight(rows, rule)
    if weight == 0:
        return math.nan
    return loss_sum / weight if rule.task_loss_reduction == "mean" else loss_sum


def _global_loss(values: list[float], reduction: str) -> float:
    present = [value for value in values if not math.isnan(value)]
    if not present:
        return math.nan
    if reduction == "norm":
        return math.sqrt(math.fsum([1.0, *(value * value for value in present)]))
    if reduction == "median":
        return sorted(present)[(len(present) - 1) // 2]
    if reduction == "mean":
        return math.fsum(present) / len(present)
    if reduction == "sum":
        return math.fsum(present)
    return min(present) if reduction == "min" else max(present)


def _global_slopes(values: list[float], reduction: str) -> list[float]:
    """The derivative of the global loss by each task's; ties of a minimum, maximum or median are not looked for."""
    present = [value for value in values if not math.isnan(value)]
    loss = _global_loss(values, reduction)
    if reduction == "norm":
        return [0.0 if math.isnan(value) else value / loss for value in values]
    if reduction in ("mean", "sum"):
        slope = 1.0 / len(present) if reduction == "mean" and present else 1.0
        return [0.0 if math.isnan(value) else slope for value in values]
    return [1.0 if value == loss else 0.0 for value in values]
