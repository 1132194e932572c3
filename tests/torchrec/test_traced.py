"""A model and its loss in TrainPipelineSparseDist with nothing sharded: the pipeline traces the loss too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import reference
from tests.support.by_hand import HandRanker, Rows, together
from tests.torchrec.one_process import run_on_ranks
from twloss import LossType, build_multi_task_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # by TorchRec's and torch's own modules
    pytest.importorskip("torchrec", reason="TorchRec needs an environment of its own")
    from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
    from torchrec.distributed.train_pipeline import tracing
    from torchrec.distributed.types import ShardingPlan
    from torchrec.streamable import Pipelineable

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # by TorchRec

TASKS = ["like", "reply"]
POS_WEIGHTS = [1.0, 3.5]
FEATURES, LEARNING_RATE = 3, 0.1


@dataclass
class Batch(Pipelineable):
    """Rows, which need not move."""

    features: Tensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:  # noqa: ARG002 (a pipeline's signature)
        """The batch itself."""
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        """Nothing: there is no stream."""


class ModelAndLoss(nn.Module):
    """A model that gives logits, and a loss function: what the pipeline calls."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to train on, and what is to be looked at."""
        logits = self.model(batch.features)
        losses = self.loss_fn(logits, batch.labels, batch.weights)
        outputs = {"logits": logits, "labels": batch.labels}
        outputs.update({key: value for key, value in losses.items()})  # noqa: C416 (a trace has to go through it)
        return losses["loss"], {key: value.detach() for key, value in outputs.items()}


def batches(rank: int, world_size: int) -> list[Batch]:
    """Equal shares, with which DDP's mean of the ranks' gradients is that of all rows."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(4):
        features = torch.randn(12, FEATURES, generator=generator, dtype=torch.float64)
        labels = (torch.rand(12, len(TASKS), generator=generator) < 0.3).double()
        weights = torch.rand(12, len(TASKS), generator=generator, dtype=torch.float64)
        rows = slice(rank, None, world_size)
        found.append(Batch(features[rows], labels[rows], weights[rows]))
    return found


def run_on_rank(rank: int, world_size: int) -> tuple[list[dict[str, float]], dict[str, float], int, list[str]]:
    """The steps' losses, those of all steps, the steps that were counted, and what the trace calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        loss = build_multi_task_loss(LossType.BCE_WITH_LOGITS, TASKS, pos_weights=POS_WEIGHTS)
        model: nn.Module = ModelAndLoss(heads, loss)
        traced = [str(node.target) for node in tracing.Tracer([]).trace(model).nodes if node.op == "call_module"]
        model = DistributedModelParallel(model, device=torch.device("cpu"), plan=ShardingPlan({}))
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        pipeline: Any = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
        data = iter(batches(rank, world_size))
        steps = []
        while True:
            try:
                outputs = pipeline.progress(data)
            except StopIteration:
                break
            steps.append({key: value.item() for key, value in outputs.items() if key.startswith("loss")})
        values = {key: value.item() for key, value in loss.train_metric.compute().items()}
        return steps, values, loss.train_metric.update_count, traced


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_traced_loss_trains_and_counts_each_step_once(world_size: int, request: pytest.FixtureRequest) -> None:
    answers = run_on_ranks(world_size, request, run_on_rank, world_size)
    torch.manual_seed(0)
    heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
    ranker = HandRanker(heads, TASKS, learning_rate=LEARNING_RATE, pos_weights=POS_WEIGHTS)
    rows = [Rows.of(batch.features, batch.labels, batch.weights) for batch in batches(0, 1)]
    own: list[list[dict[str, float]]] = [[] for _ in answers]
    seen = []
    for whole in rows:
        for rank, losses in enumerate(own):
            losses.append(ranker.losses(whole.take(range(rank, 12, world_size))))
        seen.append(ranker.step(whole))
    expected = reference.losses(together(seen), reference.Rule())
    for rank, (steps, values, counted, traced) in enumerate(answers):
        assert traced == ["model", "loss_fn"]
        assert counted == len(steps) == 4
        for found, oracle in zip(steps, own[rank]):
            assert found == pytest.approx(oracle, rel=1e-12)
        assert values == pytest.approx(expected, rel=1e-12)
