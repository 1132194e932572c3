"""The pattern of TorchRec's train pipelines: one module of model and loss, ``losses, outputs = model(batch)``.

``python examples/torchrec_style.py``, or on two processes
``torchrun --standalone --nproc-per-node=2 examples/torchrec_style.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twloss import LossType, MultiTaskLoss

TASKS = ["like", "reply", "share"]
FEATURES, ROWS, GLOBAL_BATCH, LOG_EVERY = 4, 91, 15, 3


@dataclass
class Batch:
    """What a pipeline moves to the device and hands to the model: features, labels ``(rows, tasks)`` and weights."""

    features: Tensor
    labels: Tensor
    weights: Tensor

    def __getitem__(self, index: slice) -> Batch:
        """Some of the rows."""
        return Batch(self.features[index], self.labels[index], self.weights[index])


class ModelAndLoss(nn.Module):
    """What the pipeline drives: a batch in, the loss to train on and what is to be looked at out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # global_batch: the gradient that DDP averages is exact where ranks have 8 and 7 rows, or 1 and none.
        self.loss = MultiTaskLoss(LossType.BCE_WITH_LOGITS, TASKS, pos_weights=[1.0, 27.3, 4.0], global_batch=True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The global loss, and the outputs, with the losses of this step."""
        logits = self.model(batch.features)
        losses: dict[str, Tensor] = self.loss(logits, batch.labels, batch.weights)
        outputs = {"probabilities": logits.detach().sigmoid(), "labels": batch.labels}
        return losses["loss"], {**outputs, **{key: value.detach() for key, value in losses.items()}}


def rows() -> Batch:
    """Features ``(rows, FEATURES)``, labels ``(rows, tasks)`` and weights of each task's rows, some of them 0."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    labels = (features[:, : len(TASKS)] + torch.randn(ROWS, len(TASKS), generator=generator) > 0).double()
    weights = 2 * torch.rand(labels.shape, generator=generator, dtype=torch.float64)
    return Batch(features, labels, weights * (torch.rand(labels.shape, generator=generator) < 0.8))


def progress(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """One step, as TrainPipelineBase.progress() takes it."""
    batch = next(batches)
    optimizer.zero_grad()
    losses, outputs = model(batch)
    torch.sum(losses, dim=0).backward()
    optimizer.step()
    result: dict[str, Tensor] = outputs
    return result


def main() -> list[dict[str, float]]:
    """Train for an epoch, and return what was logged: the losses of every three steps, over all ranks."""
    steps = -(-ROWS // GLOBAL_BATCH)
    torch.manual_seed(0)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    inner = ModelAndLoss(nn.Linear(FEATURES, len(TASKS), dtype=torch.float64))
    model = DistributedDataParallel(inner) if world_size > 1 else inner
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = rows()
    # Of the last global batch, a single row, the second of two ranks gets none, and takes the step with 0 rows.
    batches = (data[start : start + GLOBAL_BATCH][rank::world_size] for start in range(0, ROWS, GLOBAL_BATCH))
    logged = []
    for step in range(1, steps + 1):
        progress(model, optimizer, batches)
        if step % LOG_EVERY == 0 or step == steps:
            # The loss of all the rows since the last time, which the average of the steps' losses is not.
            values = {key: value.item() for key, value in inner.loss.train_metric.compute().items()}
            inner.loss.train_metric.reset()
            logged.append(values)
            if rank == 0:
                for key, value in values.items():
                    print(f"step {step} {key:<12} {value:.6f}")
    return logged


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main()
    if dist.is_initialized():
        # A collector's run, because DDP is in reference cycles: gloo aborts a process that ends with a group in use.
        gc.collect()
        dist.destroy_process_group()
