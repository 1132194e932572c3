"""TensorBoard: the exact curves of training and evaluation, over all rows of all ranks.

``python examples/tensorboard_logging.py runs/ranker``, or on two processes ``torchrun
--standalone --nproc-per-node=2 examples/tensorboard_logging.py runs/ranker``; then
``tensorboard --logdir runs``.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

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


def write(writer: SummaryWriter | None, loss: MultiTaskLoss, step: int) -> None:
    """One point of each curve of the loss's mode, and its sums start anew."""
    # Every rank computes, since that is a collective; one writes.
    values = compute_all(loss, reset=True)
    if writer is not None:
        for key, value in values.items():
            # "loss/like" and "loss/reply" come in one group, "loss". In float64, as
            # they were computed.
            writer.add_scalar(key, value, step, new_style=True, double_precision=True)


def main(log_dir: Path, epochs: int = 3) -> None:
    """Train, and write a point after each epoch."""
    torch.manual_seed(0)
    ranker = Ranker()
    model = DistributedDataParallel(ranker) if dist.is_initialized() else ranker
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    # A directory each: TensorBoard draws the curves of one name over each other, in the
    # colours of their directories.
    writers: dict[str, SummaryWriter | None] = {"train": None, "eval": None}
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first:
        writers = {mode: SummaryWriter(log_dir / mode) for mode in writers}
    train_batches = share_of(rows(TRAIN_ROWS, seed=1))
    eval_batches = share_of(rows(EVAL_ROWS, seed=2))
    step = 0
    for _ in range(epochs):
        model.train()
        for features, labels in train_batches:
            optimizer.zero_grad()
            model(features, labels)["loss"].backward()
            optimizer.step()
            step += 1
        write(writers["train"], ranker.loss, step)
        model.eval()
        with torch.no_grad():
            for features, labels in eval_batches:
                model(features, labels)
        write(writers["eval"], ranker.loss, step)
    for writer in writers.values():
        if writer is not None:
            writer.close()
    if is_first:
        print(f"tensorboard --logdir {log_dir}")


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/ranker"))
    if dist.is_initialized():
        # A collector's run, because DDP is in reference cycles: gloo aborts a process
        # that ends with a group in use.
        gc.collect()
        dist.destroy_process_group()
