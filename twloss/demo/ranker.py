"""The model, with its loss as a submodule: ids and genres -> logits ``(rows, tasks)`` -> the losses to train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twloss import LossType, MultiTaskLoss
from twloss.demo.movielens import DECADES, TASKS, Rows

__all__ = ["LOSS_TYPES", "Ranker", "build_ranker", "constant_logits"]

LOSS_TYPES: dict[str, LossType | nn.Module] = {
    "like": LossType.BCE_WITH_LOGITS,
    "love": LossType.BCE_WITH_LOGITS,
    "dislike": LossType.BCE_WITH_LOGITS,
    "stars": nn.MSELoss(reduction="none"),
}


class Ranker(nn.Module):
    """Sums an embedding of each id and of the genres, and scores the sum for every task.

    Args:
        vocabulary: the number of ids in each column of the ids, "unknown" included.
        genres: the number of genres.
        means: ``(tasks,)``, each label's mean in training; what the model predicts before it has learnt.
        width: of the embeddings.
    """

    def __init__(self, vocabulary: Sequence[int], genres: int, means: Tensor, width: int = 32) -> None:
        super().__init__()
        embeddings = [nn.Embedding(size, width) for size in vocabulary]
        self.embeddings = nn.ModuleList(embeddings)
        self.genres = nn.Linear(genres, width)
        self.heads = nn.Linear(width, len(TASKS))
        # global_batch: the loss, and the gradient, of the rows of all ranks, however unevenly they are shared out.
        # quality: the normalised entropy and the calibration beside it, of the binary tasks.
        # segments: all of it for the movies of each decade too.
        by_decade = {"decade": DECADES}
        self.loss = MultiTaskLoss(LOSS_TYPES, TASKS, global_batch=True, quality=True, segments=by_decade)
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=0.05)
        with torch.no_grad():
            self.heads.bias.copy_(constant_logits(means))

    def logits(self, ids: Tensor, genres: Tensor) -> Tensor:
        """The scores ``(rows, tasks)`` of ids ``(rows, 3)`` and genres ``(rows, genres)``."""
        hidden = self.genres(genres)
        for embedding, column in zip(self.embeddings, ids.unbind(1)):
            hidden = hidden + embedding(column)
        logits: Tensor = self.heads(hidden.relu())
        return logits

    def forward(self, ids: Tensor, genres: Tensor, labels: Tensor, decades: Tensor) -> dict[str, Tensor]:
        """``{"loss/<task>": …, "loss": …}``; adds the batch to the loss's running sums."""
        losses: dict[str, Tensor] = self.loss(self.logits(ids, genres), labels, segments={"decade": decades})
        return losses


def constant_logits(means: Tensor) -> Tensor:
    """The logits ``(tasks,)`` that predict each task's mean label: of a regression the mean itself."""
    is_binary = torch.tensor([LOSS_TYPES[task] is LossType.BCE_WITH_LOGITS for task in TASKS], device=means.device)
    return means.logit().where(is_binary, means)


def build_ranker(train_rows: Rows) -> Ranker:
    """A new ranker for these rows, on their device.

    In float64, as the check of the evaluation is: the last bit of a float32 logit may depend on the batch around it.
    """
    vocabulary = (train_rows.ids.amax(0) + 1).tolist()
    ranker = Ranker(vocabulary, train_rows.genres.shape[1], train_rows.labels.mean(0).cpu())
    return ranker.to(train_rows.labels)
