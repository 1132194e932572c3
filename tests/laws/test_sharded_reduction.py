"""A reduction with parameters that FSDP2 shards: the running losses are computed from the whole parameters."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.counts import CollectiveLog
from tests.support import reference
from tests.support.cases import Ranker, Rows, Settings, columns, joined
from tests.support.gradient_errors import case_parts
from tests.support.rank_pool import RankPool
from tests.support.results import numbers
from twloss import MultiTaskLoss, compute_all

SCALES, BIAS = [0.3, -0.5, 1.1], [0.25]
CASE = Settings(3)


class Uncertainty(nn.Module):
    """Learned weights of the tasks, of an odd number of them for two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.tensor(SCALES, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(BIAS, dtype=torch.float64))

    def forward(self, losses: Tensor) -> Tensor:
        """The weighted sum, and what keeps the weights from 0."""
        return ((-self.scales).exp() * losses + self.scales).sum() + self.bias.sum()


def expected(rows: Rows, scales: list[float], bias: list[float]) -> dict[str, float]:
    """By Python floats."""
    losses = reference.losses(columns(CASE, rows), CASE.rule())
    values = [losses[f"loss/{task}"] for task in CASE.names()]
    losses["loss"] = math.fsum([*(math.exp(-s) * x + s for s, x in zip(scales, values)), *bias])
    return losses


def whole(values: Any) -> list[float]:
    """The numbers of a parameter that may be sharded."""
    numbers: list[float] = (values.full_tensor() if hasattr(values, "full_tensor") else values).tolist()
    return numbers


def sharded(shard: str) -> tuple[Ranker, Any]:
    """A model that is sharded, and its loss or the loss's reduction before it, or the model alone."""
    reduction = Uncertainty()
    loss = MultiTaskLoss("bce_with_logits", CASE.names(), "mean", reduction, global_batch=True)
    model = Ranker(loss, CASE.tasks)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if shard != "model":
        fully_shard({"loss": loss, "reduction": reduction}[shard], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, loss


def train(rank: int, parts: list[Rows], shard: str, backward: bool) -> list[Any]:
    """The running losses of each mode, after a batch, with the parameters of then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a reduction that is no mean, and of views
        model, loss = sharded(shard)
        reduction = loss.global_reduction
        losses = model(parts[rank])
        if backward:
            losses["loss"].backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.eval()
        with torch.no_grad():
            evaluated = {key: value.item() for key, value in model(parts[rank]).items()}
    found = [loss.train_metric.compute(), loss.train_metric.compute(), loss.eval_metric.compute()]
    results = [{key: value.item() for key, value in result.items()} for result in found]
    together = compute_all({"train": loss.train_metric, "eval": loss})
    for name, result in (("train", results[0]), ("eval", results[2])):
        assert {key: together[f"{name}/{key}"].item() for key in result} == result
    view = loss.train_metric.scalar("loss").compute().item()
    return [results, view, evaluated, whole(reduction.scales), whole(reduction.bias)]


@pytest.mark.parametrize("shard", ["model", "loss", "reduction"])
@pytest.mark.parametrize("backward", [False, True])
def test_running_losses_of_a_sharded_reduction(two_ranks: RankPool, shard: str, backward: bool) -> None:
    parts = case_parts(CASE, 2, weighted=True)
    for (train_result, again, eval_result), view, evaluated, scales, bias in two_ranks.run(
        train, parts, shard, backward
    ):
        assert (scales != SCALES) == backward
        exact = expected(joined(parts), scales, bias)
        assert train_result == again == pytest.approx(exact, rel=1e-12)
        assert view == train_result["loss"]
        assert eval_result == pytest.approx(evaluated, rel=1e-12)
        if not backward:
            assert eval_result == pytest.approx(exact, rel=1e-12)


def log_a_step_later(rank: int, parts: list[Rows], shard: str, is_joint: bool) -> list[Any]:
    """What two steps logged before the parameters changed, and with which; and the collectives that waiting took."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, loss = sharded(shard)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        logged = []
        for _ in range(2):
            losses = model(parts[rank])
            pending = loss.compute_async() if is_joint else loss.train_metric.compute_async()
            losses["loss"].backward()
            parameters = [whole(loss.global_reduction.scales), whole(loss.global_reduction.bias)]
            optimizer.step()
            loss.global_reduction.eval()
            with CollectiveLog() as log:
                result = pending.wait()
            logged.append((numbers(result), *parameters, log.names))
            loss.train_metric.reset()
    return logged


@pytest.mark.parametrize("shard", ["model", "loss", "reduction"])
@pytest.mark.parametrize("is_joint", [False, True])
def test_a_pending_result_is_of_the_sharded_parameters_of_the_call(
    two_ranks: RankPool, shard: str, is_joint: bool
) -> None:
    parts = case_parts(CASE, 2, weighted=True)
    for first, second in two_ranks.run(log_a_step_later, parts, shard, is_joint):
        assert first[1:] == (SCALES, BIAS, [])
        assert first[0]["loss"] == pytest.approx(expected(joined(parts), SCALES, BIAS)["loss"], rel=1e-12)
        later, scales, bias, waited = second
        assert scales != SCALES
        assert waited == []
        # The heads have moved too: by hand, of the tasks' losses there are.
        losses = [later[f"loss/{task}"] for task in CASE.names()]
        reduced = math.fsum([*(math.exp(-s) * x + s for s, x in zip(scales, losses)), *bias])
        assert later["loss"] == pytest.approx(reduced, rel=1e-12)
