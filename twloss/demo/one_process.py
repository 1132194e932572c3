"""What one process gets from all rows in one batch: rows come in, their losses go out.

Nothing here is a collective or a running sum of the ranker's: these are the numbers to measure others against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twloss import MultiTaskLoss
from twloss.demo.movielens import DECADES, TASKS, Rows, Split
from twloss.demo.ranker import LOSS_TYPES, Ranker, constant_logits
from twloss.demo.training import Losses

__all__ = ["base_rate_losses", "one_process_losses"]


def one_process_losses(ranker: Ranker, rows: Rows) -> Losses:
    """The ranker's losses on these rows, and on those of the movies of each decade."""
    with torch.no_grad():
        logits = ranker.logits(rows.ids, rows.genres)
        losses = _losses(logits, rows.labels)
        for decade, name in enumerate(DECADES):
            own = rows.decades == decade
            of_decade = _losses(logits[own], rows.labels[own])
            losses.update((f"{key}/decade={name}", value) for key, value in of_decade.items())
    return losses


def base_rate_losses(split: Split) -> Losses:
    """The evaluation's losses of a constant prediction: each label's mean in the training rows."""
    logits = constant_logits(split.train.labels.mean(0))
    return _losses(logits.expand_as(split.eval.labels), split.eval.labels)


def _losses(logits: Tensor, labels: Tensor) -> Losses:
    loss = MultiTaskLoss(LOSS_TYPES, TASKS)
    return {key: value.item() for key, value in loss(logits, labels).items()}
