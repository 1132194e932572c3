"""Lightning: exact losses over all rows of all ranks in its log, with DDP.

``python examples/lightning_ranker.py`` runs on two processes, of which it starts the
second one itself; an argument sets the number of processes. A second one names a
folder: the weights of the lowest evaluation loss are kept there, and training stops
where it has not fallen for three evaluations.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import Metric

from twloss import MultiTaskLoss, compute_all

TASKS = ["like", "reply", "share"]
FEATURES, TRAIN_ROWS, EVAL_ROWS = 4, 125, 61
GLOBAL_BATCH = 16
MISSING = -1


def rows(count: int, seed: int) -> TensorDataset:
    """Features ``(rows, FEATURES)`` and labels ``(rows, tasks)``, some missing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator)
    noise = torch.randn(count, len(TASKS), generator=generator)
    labels = (features[:, : len(TASKS)] + noise > 0).float()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = MISSING
    return TensorDataset(features, labels)


class Everywhere(Metric):
    """A number that every rank has already; without states there is nothing to sync."""

    value: Tensor

    def update(self, value: Tensor) -> None:
        """Take the number."""
        self.value = value

    def compute(self) -> Tensor:
        """Give it back."""
        return self.value


class Ranker(lightning.LightningModule):
    """A linear ranker; the loss, and with it the running sums, is a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS))
        # global_batch: DDP's averaged gradient is that of one process with all rows.
        self.loss = MultiTaskLoss(
            "bce_with_logits",
            TASKS,
            ignore_index=MISSING,
            global_batch=True,
        )

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The step's loss, to train on; forward has added the batch to the sums."""
        features, labels = batch
        losses: dict[str, Tensor] = self.loss(self.heads(features), labels)
        of_step = {f"step/{key}": value for key, value in losses.items()}
        self.log_dict(of_step, on_step=True, on_epoch=False)
        return losses["loss"]

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Lightning has called eval(): forward adds to the evaluation's sums alone."""
        features, labels = batch
        self.loss(self.heads(features), labels)

    def on_train_epoch_end(self) -> None:
        """All training rows since the last time."""
        self.log_all({"train": self.loss})

    def on_validation_epoch_end(self) -> None:
        """All evaluation rows since the last time; the loss is still in eval()."""
        self.log_all({"eval": self.loss})

    def log_all(self, losses: dict[str, MultiTaskLoss]) -> None:
        """Log what losses track in their mode, on every rank, and start them anew."""
        for key, value in compute_all(losses, reset=True).items():
            # Of a tensor, Lightning would advise to average it over the ranks.
            everywhere = Everywhere()
            everywhere.update(value)
            self.log(key, everywhere, metric_attribute=key)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's training rows."""
        return self._share(rows(TRAIN_ROWS, seed=1))

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's evaluation rows."""
        return self._share(rows(EVAL_ROWS, seed=2))

    def _share(self, data: TensorDataset) -> DataLoader[Any]:
        # Each row on one rank. Lightning's own DistributedSampler would repeat rows
        # until the ranks have equally many, and those would count twice. The last
        # batches differ in size, the numbers of batches must not.
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        mine = range(rank, len(data), world_size)
        return DataLoader(Subset(data, mine), batch_size=GLOBAL_BATCH // world_size)


def callbacks(folder: str | None) -> list[Callback]:
    """What watches the evaluation loss, which is the same number on every rank."""
    if folder is None:
        return []
    best = ModelCheckpoint(folder, filename="best", monitor="eval/loss")
    return [EarlyStopping("eval/loss", patience=3), best]


def main(
    devices: int = 2, folder: str | None = None, **options: Any
) -> dict[str, float]:
    """Evaluate, then train for two epochs with two evaluations in each."""
    torch.manual_seed(0)
    model = Ranker()
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": folder is not None,
        "enable_progress_bar": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        val_check_interval=0.5,
        callbacks=callbacks(folder),
        **{**defaults, **options},
    )
    before = trainer.validate(model, verbose=False)[0]
    trainer.fit(model)
    after = {key: value.item() for key, value in trainer.callback_metrics.items()}
    results = {**{f"untrained {key}": value for key, value in before.items()}, **after}
    if trainer.is_global_zero:
        for key, value in results.items():
            print(f"{key:<24} {value:.6f}")
    return results


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2, *sys.argv[2:3])
