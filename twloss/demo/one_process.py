"""What one process gets from all rows in one batch: rows come in, their losses go out.

Nothing here is a collective or a running sum of the ranker's: these are the numbers to measure others against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twloss import MultiTaskLoss
from twloss.demo.movielens import TASKS, Rows, Split
from twloss.demo.ranker import LOSS_TYPES, Ranker, constant_logits
from twloss.demo.training import Losses

__all__ = ["base_rate_losses", "one_process_losses"]


def one_process_losses(ranker: Ranker, rows: Rows) -> Losses:
    """The ranker's losses on these rows."""
    with torch.no_grad():
        return _losses(ranker.logits(rows.ids, rows.genres), rows.labels)


def base_rate_losses(split: Split) -> Losses:
    """The evaluation's losses of a constant prediction: each label's mean in the training rows."""
    logits = constant_logits(split.train.labels.mean(0))
    return _losses(logits.expand_as(split.eval.labels), split.eval.labels)


def _losses(logits: Tensor, labels: Tensor) -> Losses:
    loss = MultiTaskLoss(LOSS_TYPES, TASKS)
    return {key: value.item() for key, value in loss(logits, labels).items()}
