"""Ray Train: exact losses and gradients on workers that have unequally many rows.

``python examples/ray_train.py`` starts two workers; an argument sets their number.
"""

from __future__ import annotations

import sys
from typing import Any

import ray
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import Tensor, nn

from twloss import MultiTaskLoss, compute_all

TASKS = ["like", "reply", "share"]
FEATURES, ROWS, GLOBAL_BATCH, MISSING = 4, 45, 8, -1


class Ranker(nn.Module):
    """A linear ranker with its loss as a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        # global_batch: DDP's averaged gradient is that of one process with all rows.
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


def rows() -> tuple[Tensor, Tensor]:
    """Features ``(rows, FEATURES)`` and labels ``(rows, tasks)``, some missing."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, FEATURES, generator=generator).double()
    noise = torch.randn(ROWS, len(TASKS), generator=generator)
    labels = (features[:, : len(TASKS)] + noise > 0).double()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = MISSING
    return features, labels


def train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker does; Ray has made the process group."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(0)
    ranker = Ranker()
    model = prepare_model(ranker)  # DDP where there are several workers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    # The last batch has 5 rows: two workers get 3 and 2 of them. A worker that gets
    # none goes on with a batch of 0 rows, as every forward is a collective.
    batches = [
        (features[rank::world_size], labels[rank::world_size])
        for features, labels in zip(*(part.split(GLOBAL_BATCH) for part in rows()))
    ]
    for _ in range(config["epochs"]):
        for features, labels in batches:
            optimizer.zero_grad()
            model(features, labels)["loss"].backward()
            optimizer.step()
        # A collective: every worker gets the losses of all rows. Ray takes no tensors.
        results = compute_all(ranker.loss, reset=True)
        values = {key: value.item() for key, value in results.items()}
        ray.train.report(values)
    state = {key: value.tolist() for key, value in ranker.state_dict().items()}
    return {"losses": values, "state": state}


def main(workers: int = 2, epochs: int = 3) -> dict[str, Any]:
    """Train, and return what the first worker returned."""
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"epochs": epochs},
        scaling_config=ScalingConfig(num_workers=workers),
    )
    answer: dict[str, Any] = trainer.fit().return_value
    return answer


if __name__ == "__main__":
    result = main(workers=int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    for key, value in result["losses"].items():
        print(f"{key:<12} {value:.6f}")
