"""Training on several hosts: a step's loss is one process's, however rows are split.

``python examples/several_hosts.py``, or ``torchrun --nnodes=2 …`` on each host, as in
docs/guides/several-hosts.md. Where another host is gone, a rank prints its own sums.
"""

from __future__ import annotations

import argparse
import gc
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twloss import MultiTaskLoss, global_sums

TASKS = ["like", "reply", "share"]
FEATURES, ROWS, GLOBAL_BATCH, LEARNING_RATE, STEPS = 4, 91, 15, 0.1, 14

Losses = dict[str, Tensor]


class Ranker(nn.Module):
    """A linear ranker with its loss, in float64, so that its last digits count."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, global_batch=True)
        self.loss.train_metric.persistent(True)

    def forward(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> Losses:
        """The losses of this step, over the rows of all ranks."""
        losses: Losses = self.loss(self.heads(inputs), labels, weights)
        return losses


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Features ``(rows, FEATURES)``, labels and weights ``(rows, tasks)``."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    noise, weights = torch.rand(2, ROWS, len(TASKS), generator=generator).double()
    return inputs, (inputs[:, : len(TASKS)] + noise > 0.5).double(), 2 * weights


def place() -> tuple[int, int]:
    """This rank and the number of ranks."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(batch: Tensor) -> Tensor:
    """This rank's part of a global batch; the first takes two rows to another's one."""
    rank, world_size = place()
    return batch[batch % (world_size + 1) % world_size == rank]


def train(ranker: Ranker, steps: int) -> None:
    """Take steps on the next 15 of 91 rows each; the last batch has a single one."""
    rank, world_size = place()
    model = DistributedDataParallel(ranker) if world_size > 1 else ranker
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    data = rows()
    batches = torch.arange(ROWS).split(GLOBAL_BATCH)
    for step in range(steps):
        # A rank without a row takes the step too, with 0 rows.
        part = share(batches[step % len(batches)])
        losses = model(*(tensor[part] for tensor in data))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step + 1} loss {losses['loss'].item()!r}", flush=True)


def report_own_sums(ranker: Ranker, error: Exception) -> None:
    """Print what this rank has summed; a collective that fails changes none of it."""
    metric, rank = ranker.loss.train_metric, place()[0]
    metric.sync_on_compute = False
    print(f"rank {rank} updates {metric.update_count}")
    for key, value in metric.compute().items():
        print(f"rank {rank} {key} {value.item()!r}")
    print(f"rank {rank} is alone: {error}", flush=True)


def main(steps: int = STEPS, save: str | None = None) -> dict[str, float]:
    """Train, and return the losses of all rows of all steps and ranks."""
    torch.manual_seed(0)
    ranker = Ranker()
    try:
        train(ranker, steps)
        losses = ranker.loss.compute()
        with global_sums(ranker):  # a collective, as compute() is
            state = ranker.state_dict()
    except RuntimeError as error:  # of gloo, and of NCCL
        report_own_sums(ranker, error)
        raise
    if place()[0] == 0:
        for key, value in losses.items():
            print(f"all {key} {value.item()!r}")
        if save is not None:
            torch.save(state, save)
    return {key: value.item() for key, value in losses.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--timeout", type=float, default=120, help="in seconds")
    parser.add_argument("--save", help="the file for the weights and all ranks' sums")
    options = parser.parse_args()
    if dist.is_torchelastic_launched():
        timeout = timedelta(seconds=options.timeout)
        dist.init_process_group("gloo", timeout=timeout)  # "nccl" on GPUs
    main(options.steps, options.save)
    if dist.is_initialized():
        # DDP is in reference cycles; gloo aborts a process that ends with it in use.
        gc.collect()
        dist.destroy_process_group()
