"""Lightning: exact losses over all rows of all ranks in ``self.log``, on two processes with DDP.

``python examples/lightning_ranker.py`` starts the second process itself; an argument sets the number of processes.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from twloss import MultiTaskLoss

TASKS = ["like", "reply", "share"]
FEATURES, TRAIN_ROWS, EVAL_ROWS = 4, 125, 61
GLOBAL_BATCH = 16
MISSING = -1


def rows(count: int, seed: int) -> TensorDataset:
    """Features ``(rows, FEATURES)`` and labels ``(rows, tasks)``, of which three in ten are missing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator)
    labels = (features[:, : len(TASKS)] + torch.randn(count, len(TASKS), generator=generator) > 0).float()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = MISSING
    return TensorDataset(features, labels)


class Ranker(lightning.LightningModule):
    """A linear ranker; the loss, and with it the running sums, is a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS))
        # global_batch: DDP's averaged gradient is that of one process with all ranks' rows.
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, ignore_index=MISSING, global_batch=True)
        # Lightning logs a metric that is an attribute of the module and gives one number: a view of one key. After an
        # epoch it resets each logged view, which starts that view anew and leaves the sums to the other views. So the
        # metrics themselves are not reset by hand: Lightning reads the views only after on_train_epoch_end.
        self.train_loss = self.loss.train_metric.scalar("loss")
        self.train_like = self.loss.train_metric.scalar("loss/like")
        self.eval_loss = self.loss.eval_metric.scalar("loss")
        self.eval_like = self.loss.eval_metric.scalar("loss/like")

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The step's loss, to train on; forward has added the batch to train_metric."""
        features, labels = batch
        losses: dict[str, Tensor] = self.loss(self.heads(features), labels)
        # The tensors, for on_step: a view has no value of a batch that came through the model, so that
        # self.log(view, on_step=True) would log nothing.
        self.log_dict({f"step/{key}": value for key, value in losses.items()}, on_step=True, on_epoch=False)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/loss/like", self.train_like, on_step=False, on_epoch=True)
        return losses["loss"]

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Lightning has called eval(): forward adds to eval_metric, and the epoch's training sums stay as they are."""
        features, labels = batch
        self.loss(self.heads(features), labels)
        self.log("eval/loss", self.eval_loss)
        self.log("eval/loss/like", self.eval_like)

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
        # Each row on one rank. Lightning's own DistributedSampler would repeat rows until the ranks have equally many,
        # and those would count twice. The last batches differ in size, the numbers of batches must not.
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        mine = range(rank, len(data), world_size)
        return DataLoader(Subset(data, mine), batch_size=GLOBAL_BATCH // world_size)


def main(devices: int = 2, **options: Any) -> dict[str, float]:
    """Evaluate, train for two epochs with two evaluations in each, and return the last values."""
    torch.manual_seed(0)
    model = Ranker()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=2,
        val_check_interval=0.5,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options},
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
    main(devices=int(sys.argv[1]) if len(sys.argv) > 1 else 2)
