"""A sharded ranker in TorchRec's train pipelines, trained as one process would.

``python examples/torchrec_ranker.py``, or on two processes
``torchrun --standalone --nproc-per-node=2 examples/torchrec_ranker.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import (
    DistributedModelParallel,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    data_parallel,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

from twloss import LossType, MultiTaskLoss

TASKS = ["like", "reply", "share"]
TABLES = {"user": 20, "item": 30}  # and their rows
DENSE, DIM, LEARNING_RATE = 3, 4, 0.1
ROWS, GLOBAL_BATCH, LOG_EVERY = 91, 15, 3
CPU = torch.device("cpu")


@dataclass
class Batch(Pipelineable):
    """Numbers ``(rows, DENSE)``, ids, and labels and weights ``(rows, tasks)``."""

    dense: Tensor
    ids: KeyedJaggedTensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on a device, where a pipeline takes it."""
        parts = (self.dense, self.ids, self.labels, self.weights)
        return Batch(*(each.to(device, non_blocking=non_blocking) for each in parts))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can fetch from."""
        parts = (self.dense, self.ids, self.labels, self.weights)
        return Batch(*(each.pin_memory() for each in parts))

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the batch for as long as a GPU's stream works on it."""
        for each in (self.dense, self.ids, self.labels, self.weights):
            each.record_stream(stream)


class Ranker(nn.Module):
    """What a pipeline drives: the loss to train on and the outputs, of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=size,
                    embedding_dim=DIM,
                    feature_names=[name],
                    init_fn=partial(init_table, seed=size),
                )
                for name, size in TABLES.items()
            ]
        )
        self.heads = nn.Linear(DENSE + DIM * len(TABLES), len(TASKS))
        # global_batch: the gradients, those of the tables included, are exact where
        # ranks have 8 and 7 rows, or 1 and none.
        self.loss = MultiTaskLoss(
            LossType.BCE_WITH_LOGITS,
            TASKS,
            pos_weights=[1.0, 27.3, 4.0],
            global_batch=True,
            quality=True,
        )

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The global loss, and the losses of this step."""
        pooled = self.embeddings(batch.ids)
        features = torch.cat([batch.dense, *(pooled[name] for name in TABLES)], 1)
        losses = self.loss(self.heads(features), batch.labels, batch.weights)
        return losses["loss"], {key: value.detach() for key, value in losses.items()}


def init_table(weight: Tensor, seed: int) -> Tensor:
    """The same table on any rank; TorchRec calls it when it has sharded the model."""
    return nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))


def shard(ranker: Ranker) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The ranker with its tables on the ranks, and an optimizer of the rest."""
    apply_optimizer_in_backward(
        torch.optim.SGD, ranker.embeddings.parameters(), {"lr": LEARNING_RATE}
    )
    ranks = dist.get_world_size()
    # A table on the last rank alone, and one that each has a copy of; without a plan,
    # TorchRec makes one.
    tables = construct_module_sharding_plan(
        ranker.embeddings,
        {"user": data_parallel(), "item": table_wise(rank=ranks - 1)},
        local_size=ranks,
        world_size=ranks,
        device_type=CPU.type,
    )
    plan = ShardingPlan({"embeddings": tables})
    model = DistributedModelParallel(ranker, device=CPU, plan=plan)
    optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
    )
    return model, optimizer


def batches(rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's rows of each global batch, the last of which has a single row."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(ROWS, DENSE, generator=generator)
    labels = (dense + torch.randn(ROWS, len(TASKS), generator=generator) > 0).float()
    weights = 2 * torch.rand(labels.shape, generator=generator)
    weights *= torch.rand(labels.shape, generator=generator) < 0.8
    ids = torch.stack(
        [torch.randint(n, (ROWS, 3), generator=generator) for n in TABLES.values()]
    )
    lengths = torch.randint(4, (len(TABLES), ROWS), generator=generator)
    for start in range(0, ROWS, GLOBAL_BATCH):
        rows = slice(start + rank, min(start + GLOBAL_BATCH, ROWS), world_size)
        present = torch.arange(3) < lengths[:, rows, None]
        sparse = KeyedJaggedTensor(
            list(TABLES), ids[:, rows][present], lengths=lengths[:, rows].flatten()
        )
        yield Batch(dense[rows], sparse, labels[rows], weights[rows])


def main(
    pipeline_type: type[TrainPipelineBase] | type[TrainPipelineSparseDist],
) -> tuple[nn.Module, list[dict[str, float]], list[dict[str, float]]]:
    """Train for an epoch.

    Returns:
        The model, the losses of each step, and what was logged: every three steps, the
        losses of all their rows, and the quality of all rows until then.
    """
    torch.manual_seed(0)
    ranker = Ranker()
    model, optimizer = shard(ranker)
    pipeline = pipeline_type(model, optimizer, CPU)
    data = batches(dist.get_rank(), dist.get_world_size())
    steps, logged = [], []
    for step in range(1, 2 + (ROWS - 1) // GLOBAL_BATCH):
        losses = pipeline.progress(data)
        steps.append({key: value.item() for key, value in losses.items()})
        if step % LOG_EVERY == 0 or step * GLOBAL_BATCH >= ROWS:
            values = ranker.loss.compute()
            ranker.loss.train_metric.reset()
            logged.append({key: value.item() for key, value in values.items()})
            if dist.get_rank() == 0:
                for key, value in logged[-1].items():
                    print(f"step {step} {key:<20} {value:.6f}")
    return model, steps, logged


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    main(TrainPipelineSparseDist)
    # A collector's run, because DDP is in reference cycles: gloo aborts a process that
    # ends with a group in use.
    gc.collect()
    dist.destroy_process_group()
