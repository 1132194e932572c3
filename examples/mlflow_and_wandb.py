"""MLflow and Weights & Biases: the exact losses of training and evaluation, over ranks.

``python examples/mlflow_and_wandb.py runs``, or on two processes ``torchrun
--standalone --nproc-per-node=2 examples/mlflow_and_wandb.py runs``; then ``mlflow ui
--backend-store-uri sqlite:///runs/mlflow.db``, or ``wandb sync`` of what is in
``runs/wandb``.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import mlflow
import torch
import torch.distributed as dist
import wandb
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twloss import MultiTaskLoss, compute_all

TASKS = ["like", "reply", "share"]
FEATURES, TRAIN_ROWS, EVAL_ROWS, GLOBAL_BATCH, MISSING = 4, 97, 45, 16, -1


class Ranker(nn.Module):
    """A linear ranker with its loss as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        self.loss = MultiTaskLoss(
            "bce_with_logits",
            TASKS,
            ignore_index=MISSING,
            global_batch=True,
        )

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of the rows."""
        losses: dict[str, Tensor] = self.loss(self.heads(features), labels)
        return losses


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features ``(rows, FEATURES)`` and labels ``(rows, tasks)``, some missing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator).double()
    noise = torch.randn(count, len(TASKS), generator=generator)
    labels = (features[:, : len(TASKS)] + noise > 0).double()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = MISSING
    return features, labels


def share_of(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """This rank's rows of each batch."""
    mine = slice(None)
    if dist.is_initialized():
        mine = slice(dist.get_rank(), None, dist.get_world_size())
    features, labels = (part.split(GLOBAL_BATCH) for part in data)
    return [(x[mine], y[mine]) for x, y in zip(features, labels)]


def start_runs(folder: Path) -> Any:
    """A run of each, both without a server; wandb's is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder.resolve()}/mlflow.db")
    mlflow.start_run()
    return wandb.init(project="ranker", mode="offline", dir=folder)


def losses_since_last_time(loss: MultiTaskLoss) -> dict[str, float]:
    """Of all rows of all ranks, and the sums start anew: every rank has to call it."""
    metrics = {"train": loss.train_metric, "eval": loss.eval_metric}
    values = compute_all(metrics, reset=True)
    return {key: value.item() for key, value in values.items()}


def main(folder: Path, epochs: int = 3) -> None:
    """Train, and log after each epoch."""
    torch.manual_seed(0)
    ranker = Ranker()
    model = DistributedDataParallel(ranker) if dist.is_initialized() else ranker
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train_batches = share_of(rows(TRAIN_ROWS, seed=1))
    eval_batches = share_of(rows(EVAL_ROWS, seed=2))
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    run = start_runs(folder) if is_first else None
    for epoch in range(1, epochs + 1):
        model.train()
        for features, labels in train_batches:
            optimizer.zero_grad()
            model(features, labels)["loss"].backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for features, labels in eval_batches:
                model(features, labels)
        values = losses_since_last_time(ranker.loss)  # on every rank
        if run is not None:  # on one
            mlflow.log_metrics(values, step=epoch * len(train_batches))
            run.log(values, step=epoch * len(train_batches))
    if run is not None:
        mlflow.end_run()
        run.finish()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs"))
    if dist.is_initialized():
        # A collector's run, because DDP is in reference cycles: gloo aborts a process
        # that ends with a group in use.
        gc.collect()
        dist.destroy_process_group()
