"""PyTorch-Ignite: the loss over all rows of all ranks in ``engine.state.metrics``.

``python examples/ignite_ranker.py``, or on two processes
``torchrun --standalone --nproc-per-node=2 examples/ignite_ranker.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor, nn

from twloss import GlobalLoss, MultiTaskLoss

TASKS = ["like", "reply", "share"]
FEATURES, TRAIN_ROWS, EVAL_ROWS, GLOBAL_BATCH = 4, 97, 45, 16

Batch = tuple[Tensor, Tensor, Tensor]


class Ranker(nn.Module):
    """A linear ranker with its loss as a submodule; rows count by their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        self.loss = MultiTaskLoss(
            "bce_with_logits", TASKS, mean_over="weights", global_batch=True
        )

    def forward(
        self, features: Tensor, labels: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """The losses of the rows; also adds to train_metric, or to eval_metric."""
        losses: dict[str, Tensor] = self.loss(self.heads(features), labels, weights)
        return losses


def rows(count: int, seed: int) -> Batch:
    """Features ``(rows, FEATURES)``, labels ``(rows, tasks)``, weights ``(rows,)``."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, len(TASKS), generator=generator)
    labels = (features[:, : len(TASKS)] + noise > 0).double()
    weights = 4 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
    return features, labels, weights.clamp(min=0)


def shares(data: Batch) -> list[Batch]:
    """This rank's part of each global batch: no row of the last one on a second rank.

    A sampler that gives every rank equally many rows would repeat some, which would
    then count twice.
    """
    batches = zip(*(values.split(GLOBAL_BATCH) for values in data))
    rank, world_size = idist.get_rank(), idist.get_world_size()
    return [tuple(values[rank::world_size] for values in batch) for batch in batches]


def attach(metric: GlobalLoss, engine: Engine) -> None:
    """Fill ``engine.state.metrics`` at each epoch's end, for handlers added later.

    Ignite's own metrics take a process function's output; this one has been fed by the
    model's forward.
    """

    @engine.on(Events.EPOCH_STARTED)
    def start_anew() -> None:
        metric.reset()

    @engine.on(Events.EPOCH_COMPLETED)
    def compute() -> None:  # one collective: the handler runs on every rank
        values = {key: value.item() for key, value in metric.compute().items()}
        engine.state.metrics.update(values)


def main(epochs: int = 2) -> dict[str, float]:
    """Train, evaluate after each epoch, and return the last values of both."""
    torch.manual_seed(0)
    ranker = Ranker()
    model = idist.auto_model(ranker)  # DDP where there are several ranks
    optimizer = torch.optim.SGD(ranker.parameters(), lr=0.5)

    def train_step(_: Engine, batch: Sequence[Tensor]) -> float:
        model.train()
        optimizer.zero_grad()
        losses = model(*batch)
        losses["loss"].backward()
        optimizer.step()
        loss: float = losses["loss"].item()
        return loss

    @torch.no_grad()
    def eval_step(_: Engine, batch: Sequence[Tensor]) -> None:
        model.eval()
        model(*batch)

    trainer, evaluator = Engine(train_step), Engine(eval_step)
    attach(ranker.loss.train_metric, trainer)
    attach(ranker.loss.eval_metric, evaluator)

    train_batches = shares(rows(TRAIN_ROWS, seed=1))
    eval_batches = shares(rows(EVAL_ROWS, seed=2))

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        evaluator.run(eval_batches)

    trainer.run(train_batches, max_epochs=epochs)
    engines = {"train": trainer, "eval": evaluator}
    results = {
        f"{mode}/{key}": x
        for mode, engine in engines.items()
        for key, x in engine.state.metrics.items()
    }
    if idist.get_rank() == 0:
        for key, value in results.items():
            print(f"{key:<18} {value:.6f}")
    return results


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        idist.initialize("gloo")
    main()
    # A collector's run, because DDP is in reference cycles: gloo aborts a process that
    # ends with a group in use.
    gc.collect()
    idist.finalize()
