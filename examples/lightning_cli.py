"""Lightning's command line: the loss and its options come from a file.

``python examples/lightning_cli.py fit --config examples/lightning_cli.yaml``, and what
follows, such as ``--model.loss.pos_weights 3``, is in place of the file's.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from twloss import MultiTaskLoss

FEATURES, ROWS, BATCH, MISSING = 4, 45, 16, -1


def rows(tasks: int) -> TensorDataset:
    """Features ``(rows, FEATURES)`` and labels ``(rows, tasks)``, some missing."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, FEATURES, generator=generator)
    labels = (torch.randn(ROWS, tasks, generator=generator) > 0).float()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = MISSING
    return TensorDataset(features, labels)


class Ranker(lightning.LightningModule):
    """A linear ranker with a head for each of the loss's tasks."""

    def __init__(self, loss: MultiTaskLoss, learning_rate: float = 0.5) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(loss.tasks))
        self.loss = loss
        self.learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The step's loss, to train on."""
        features, labels = batch
        losses: dict[str, Tensor] = self.loss(self.heads(features), labels)
        return losses["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> DataLoader[Any]:
        """The training rows."""
        return DataLoader(rows(len(self.loss.tasks)), batch_size=BATCH)


def main() -> LightningCLI:
    """Do what the command line says."""
    return LightningCLI(Ranker)


if __name__ == "__main__":
    main()
