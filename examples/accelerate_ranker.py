"""Accelerate: accumulated gradients are those of one big batch; logs without gather.

``python examples/accelerate_ranker.py``, or on two processes
``torchrun --standalone --nproc-per-node=2 examples/accelerate_ranker.py``;
``accelerate launch`` does as well.
"""

from __future__ import annotations

import contextlib
import gc
from itertools import islice

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from twloss import MultiTaskLoss, compute_all

TASKS = ["like", "reply", "share"]
FEATURES, ROWS, MISSING = 4, 87, -1
GLOBAL_BATCH = 10  # rows of a micro-batch on all ranks
WINDOW = 4  # micro-batches of an optimizer step


class Ranker(nn.Module):
    """A linear ranker with its loss as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        self.loss = MultiTaskLoss(
            "bce_with_logits", TASKS, ignore_index=MISSING, global_batch=True
        )

    def forward(
        self, features: Tensor, labels: Tensor, normalizer: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of the rows, divided by the normalizer where there is one."""
        losses: dict[str, Tensor] = self.loss(
            self.heads(features), labels, normalizer=normalizer
        )
        return losses


def rows() -> TensorDataset:
    """Features ``(rows, FEATURES)``, labels ``(rows, tasks)``, three in ten missing."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, len(TASKS), generator=generator)
    labels = (features[:, : len(TASKS)] + noise > 0).double()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = MISSING
    return TensorDataset(features, labels)


def main(epochs: int = 2) -> dict[str, float]:
    """Train, and return the losses of the last epoch's rows, each of its own window."""
    torch.manual_seed(0)
    # even_batches would fill the last batch up with rows from the beginning, which
    # would count twice. Here its 7 rows become 5 and 2 on two ranks. (A rank that got
    # none at all would have to go on with a batch of 0 rows.)
    loading = DataLoaderConfiguration(split_batches=True, even_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=loading)
    model = Ranker()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(rows(), batch_size=GLOBAL_BATCH)
    )
    ranker = accelerator.unwrap_model(model)  # inside of DDP
    for _ in range(epochs):
        batches = iter(loader)
        # The window's total comes before its first backward, so its batches are fetched
        # ahead. That rules accumulate() out, which asks the loader whether the data
        # have ended: it would step too often or not in the last window.
        while window := list(islice(batches, WINDOW)):
            count = sum(ranker.loss.count(labels) for _, labels in window)
            total = accelerator.reduce(count, "sum")
            for number, (features, labels) in enumerate(window, 1):
                last = number == len(window)
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    losses = model(features, labels, normalizer=total)
                    # backward() divides by gradient_accumulation_steps (1 here), but
                    # the normalizer has divided by the whole window already, which may
                    # also be shorter than that: this takes it back.
                    steps = accelerator.gradient_accumulation_steps
                    accelerator.backward(losses["loss"] * steps)
            optimizer.step()
            optimizer.zero_grad()
        # One collective, on every rank; the next epoch starts anew.
        losses = compute_all(ranker.loss, reset=True)
        results = {key: value.item() for key, value in losses.items()}
    for key, value in results.items():
        accelerator.print(f"{key:<12} {value:.6f}")
    return results


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        # A collector's run, because DDP is in reference cycles: gloo aborts a process
        # that ends with a group in use.
        gc.collect()
        dist.destroy_process_group()
