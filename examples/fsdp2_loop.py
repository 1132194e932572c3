"""FSDP2: sharded parameters, with the loss and gradient of one process on every rank.

``python examples/fsdp2_loop.py``, or on two processes
``torchrun --standalone --nproc-per-node=2 examples/fsdp2_loop.py``.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from twloss import MultiTaskLoss, compute_all

TASKS = ["like", "reply", "share"]
FEATURES, TRAIN_ROWS, EVAL_ROWS, GLOBAL_BATCH, MISSING = 4, 97, 45, 16, -1


class Ranker(nn.Module):
    """A linear ranker with its loss as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        # global_batch: FSDP averages gradients over ranks, as DDP does. The sums of all
        # ranks make that average exact.
        self.loss = MultiTaskLoss(
            "bce_with_logits", TASKS, ignore_index=MISSING, global_batch=True
        )

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of this step's rows of all ranks."""
        losses: dict[str, Tensor] = self.loss(self.heads(features), labels)
        return losses


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features ``(rows, FEATURES)``, labels ``(rows, tasks)``, three in ten missing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, len(TASKS), generator=generator)
    labels = (features[:, : len(TASKS)] + noise > 0).double()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = MISSING
    return features, labels


def shares(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of each global batch.

    Of the last one, a single row, the second of two ranks gets none: it takes the step
    all the same, with 0 rows, as every forward and backward has collectives.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [
        (x[rank::world_size], y[rank::world_size])
        for x, y in zip(*(part.split(GLOBAL_BATCH) for part in data))
    ]


def main(epochs: int = 2) -> dict[str, float]:
    """Train, evaluate, and return the losses of both. Needs a process group."""
    torch.manual_seed(0)
    model = Ranker()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.heads, mesh=mesh)  # each layer of a deeper model
    # Warns once that the losses are views; only changing one in place would matter.
    fully_shard(model, mesh=mesh)
    # After the sharding, which replaces the parameters.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(epochs):
        model.loss.reset()
        for features, labels in shares(rows(TRAIN_ROWS, seed=1)):
            losses = model(features, labels)
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for features, labels in shares(rows(EVAL_ROWS, seed=2)):
            model(features, labels)
    metrics = {"train": model.loss.train_metric, "eval": model.loss.eval_metric}
    results = {key: value.item() for key, value in compute_all(metrics).items()}
    if dist.get_rank() == 0:
        for key, value in results.items():
            print(f"{key:<18} {value:.6f}")
    return results


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:  # FSDP wants a process group, if only of one
        dist.init_process_group(
            "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
        )
    main()
    # A collector's run, because modules are in reference cycles: gloo aborts a process
    # that ends with a group in use.
    gc.collect()
    dist.destroy_process_group()
