"""precision: how exact the running sums still are after 10⁹ rows, against an exact sum of the same values.

Through the whole loss: a few batches of float64 rows come again and again, and twloss sees the rows. Through update()
alone: smaller batches, each with a sum of its own. ``math.fsum`` rounds an exact sum once, so the truth is known.
torchmetrics' MeanMetric sees each batch's mean and its number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from benchmarks.row import Row, at_most, counted
from benchmarks.workload import Setting
from twloss import GlobalLoss, Loss

__all__ = ["precision"]

GOAL = at_most(1e-12)
BATCHES = 8


def precision(setting: Setting) -> Iterator[Row]:
    """The running mean's relative error after many rows, beside that of MeanMetric."""
    total = 10**7 if setting.quick else 10**9
    yield _through_the_loss(total, setting.device)
    yield _through_update(total, setting.device)


def _through_the_loss(total: int, device: torch.device, rows: int = 65536) -> Row:
    rounds = math.ceil(total / (rows * BATCHES))
    batches = [_make_batch(rows, number, device) for number in range(BATCHES)]
    losses = [F.binary_cross_entropy_with_logits(*batch, reduction="none") for batch in batches]
    loss, rival = Loss("bce_with_logits").to(device), MeanMetric().to(device)
    with torch.no_grad():
        for _ in range(rounds):
            for (logits, labels), values in zip(batches, losses):
                loss(logits, labels)
                rival.update(values.mean(), rows)
    exact = sum((Fraction(math.fsum(values.tolist())) for values in losses), Fraction(0)) / (BATCHES * rows)
    case = f"{rounds * BATCHES * rows:.1g} rows, Loss.forward of {rows:,}"
    return _row(case, loss.train_metric.compute()["loss"], rival.compute(), exact)


def _through_update(total: int, device: torch.device, rows: int = 1024) -> Row:
    sums = torch.rand(math.ceil(total / rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * rows
    metric, rival = GlobalLoss(None).to(device), MeanMetric().to(device)
    for loss_sum, mean in zip(sums.to(device), (sums / rows).to(device)):
        metric.update(loss_sum, rows)
        rival.update(mean, rows)
    exact = Fraction(math.fsum(sums.tolist())) / (len(sums) * rows)
    case = f"{len(sums) * rows:.1g} rows, GlobalLoss.update of {rows:,}"
    return _row(case, metric.compute()["loss"], rival.compute(), exact)


def _make_batch(rows: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(rows,)`` logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, generator=generator, dtype=torch.float64)
    labels = torch.rand(rows, generator=generator) < 0.2
    return logits.to(device), labels.to(device, torch.float64)


def _row(case: str, ours: Tensor, theirs: Tensor, exact: Fraction) -> Row:
    errors = [float(abs(Fraction(value.item()) - exact) / exact) for value in (ours, theirs)]
    return counted(case, "relative error", errors[0], GOAL, rival="MeanMetric.update", theirs=errors[1])
