"""How far a step's loss and DDP gradient on uneven ranks are from those of one process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.support import reference
from tests.support.cases import FEATURES, Rows, Settings, columns, joined, parameter_gradients, random_rows
from tests.support.rank_pool import RankPool

# Rows by rank.
UNEVEN = {2: [3, 10], 3: [1, 7, 0], 4: [2, 0, 5, 3]}


@dataclass(frozen=True)
class Errors:
    """Relative errors, the largest over ranks and entries."""

    loss: float
    gradient: float


def case_parts(case: Settings, world_size: int, *, weighted: bool) -> list[Rows]:
    """The rows of each rank."""
    sizes = UNEVEN[world_size]
    return random_rows(case, sum(sizes), 5, weighted=weighted).cut(sizes)


def one_step(
    rank: int, case: Settings, parts: list[Rows], dtype: torch.dtype, options: dict[str, Any]
) -> tuple[dict[str, float], list[list[float]]]:
    """One rank's losses, and the gradients of matrix and bias, flat, as DDP averages them."""
    model = DistributedDataParallel(case.ranker(dtype, **options))
    losses = model(parts[rank].to(dtype))
    losses["loss"].backward()
    return {key: value.item() for key, value in losses.items()}, flat_gradients(model)


def flat_gradients(model: torch.nn.Module) -> list[list[float]]:
    """Each parameter's gradient as a flat list."""
    return [_whole(parameter.grad).flatten().tolist() for parameter in model.parameters() if parameter.grad is not None]


def _whole(values: Tensor) -> Tensor:
    whole = getattr(values, "full_tensor", None)  # what FSDP2 shards
    return values if whole is None else whole()


def errors_of(case: Settings, parts: list[Rows], results: list[tuple[dict[str, float], list[list[float]]]]) -> Errors:
    """What the ranks got against what one process would get of all of their rows."""
    rows = joined(parts)
    expected = reference.losses(columns(case, rows), case.rule())
    exact = exact_gradients(case, rows)
    loss = max(abs(values["loss"] - expected["loss"]) / abs(expected["loss"]) for values, _ in results)
    return Errors(loss, max(gradient_error(gradients, exact) for _, gradients in results))


def exact_gradients(case: Settings, rows: Rows) -> tuple[list[float], list[float]]:
    """The oracle's gradients of matrix and bias, flat."""
    matrix, bias = parameter_gradients(case, rows)
    return [value for line in matrix for value in line], bias


def gradient_error(gradients: list[list[float]], exact: tuple[list[float], list[float]]) -> float:
    """The largest difference, relative to the largest entry."""
    assert [len(part) for part in gradients] == [len(part) for part in exact]
    assert len(exact[0]) == FEATURES * len(exact[1])
    scale = max(abs(value) for part in exact for value in part)
    differences = (abs(a - b) for ours, theirs in zip(gradients, exact) for a, b in zip(ours, theirs))
    return max(differences) / scale if scale else math.inf


def measure(
    ranks: RankPool, case: Settings, dtype: torch.dtype = torch.float64, *, weighted: bool = True, **options: Any
) -> Errors:
    """One step on the ranks against the oracle."""
    parts = case_parts(case, ranks.world_size, weighted=weighted)
    return errors_of(case, parts, ranks.run(one_step, case, parts, dtype, options))
