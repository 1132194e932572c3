"""``get_global_loss_detached``: without a process group, on ranks, and beside the mean of means that it replaces."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.counts import CollectiveLog
from tests.support.rank_pool import RankPool
from tests.support.refusals import snapshot
from twloss import get_global_loss_detached

# By rank. The first ones are multiples of powers of two, so that sums and products are exact.
LOSSES = [4.0, 0.5, -1.25]
WEIGHTS = [1000.0, 10.0, 3.0]


def over_ranks(local_loss: Any, reduction: Any = "mean", **kwargs: Any) -> Any:
    """The detached loss, without the warning of a sum."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_global_loss_detached(local_loss, reduction, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"reduction": "sum"}, {"weight": 7.0}, {"weight": torch.tensor(7)}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_without_a_process_group_it_is_a_detached_copy(
    kwargs: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    leaf = torch.randn(shape, dtype=dtype, requires_grad=True)
    for loss in (leaf, 2 * leaf, leaf.detach()):
        before, value = snapshot(loss), loss.detach().clone()
        result = over_ranks(loss, **kwargs)
        assert torch.equal(result, value)
        assert (result.dtype, result.requires_grad, result.grad_fn) == (dtype, False, None)
        result.add_(1)
        assert torch.equal(loss, value)
        assert snapshot(loss) == before


def test_the_loss_can_be_trained_on_afterwards() -> None:
    leaf = torch.ones(3, requires_grad=True)
    loss = (leaf**2).sum()
    get_global_loss_detached(loss).zero_()
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [2.0] * 3


def test_a_mapping_keeps_its_keys_shapes_and_dtypes() -> None:
    losses: dict[str, Tensor] = {
        "loss": torch.ones((), requires_grad=True),
        "loss/like": torch.ones(2, dtype=torch.float64),
    }
    before = snapshot(losses)
    weight: dict[str, Tensor | float] = {"loss/like": 2.0, "loss": torch.tensor(3)}
    result = get_global_loss_detached(losses, weight=weight)
    assert type(result) is dict
    assert snapshot(losses) == before
    for (key, value), (name, loss) in zip(result.items(), losses.items()):
        assert key == name
        assert (value.shape, value.dtype, value.requires_grad) == (loss.shape, loss.dtype, False)
        assert value.data_ptr() != loss.data_ptr()


def reduced(rank: int, how: str, dtype: torch.dtype) -> dict[str, Any]:
    """This rank's loss, reduced in one of several ways; the result and what it took."""
    leaf = torch.full((2, 3), LOSSES[rank], dtype=dtype).T.requires_grad_()
    loss, weight = leaf * 1, WEIGHTS[rank]
    ways: dict[str, dict[str, Any]] = {
        "mean": {},
        "sum": {"reduction": "sum"},
        "weight": {"weight": weight},
        "0-dim weight": {"weight": torch.tensor(weight)},
        "integer weight": {"weight": torch.tensor([int(weight)])},
        "weight of the shape": {"weight": torch.full((3, 2), weight, dtype=torch.float64, requires_grad=True)},
        "negative weight": {"weight": -weight},
    }
    kwargs = ways[how]
    before, value, count = snapshot([loss, kwargs]), loss.detach().clone(), CollectiveLog()
    with count:
        result = over_ranks(loss, **kwargs)
    assert snapshot([loss, kwargs]) == before
    assert torch.equal(loss, value)
    assert loss.requires_grad
    assert (result.shape, result.dtype, result.requires_grad) == (loss.shape, dtype, False)
    return {"values": set(result.flatten().tolist()), "collectives": count.names}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "how", ["mean", "sum", "weight", "0-dim weight", "integer weight", "weight of the shape", "negative weight"]
)
def test_it_is_exact_in_one_collective_and_leaves_its_argument(ranks: RankPool, how: str, dtype: torch.dtype) -> None:
    n = ranks.world_size
    exact = {"mean": math.fsum(LOSSES[:n]) / n, "sum": math.fsum(LOSSES[:n])}.get(
        how, math.fsum(w * x for w, x in zip(WEIGHTS, LOSSES[:n])) / math.fsum(WEIGHTS[:n])
    )
    rounded = torch.tensor(exact, dtype=torch.float64).to(dtype).item()
    for answer in ranks.run(reduced, how, dtype):
        assert answer == {"values": {rounded}, "collectives": ["c10d.allreduce_.default"]}


def naive_mean(loss: Tensor) -> Tensor:
    """The usual helper: it averages the ranks' means, in the memory of the loss."""
    mean = loss.detach().div_(dist.get_world_size())
    dist.all_reduce(mean)
    return mean


def mean_of_means(rank: int, rows: list[int], losses: list[float]) -> list[float]:
    """The naive mean, what is left of the loss that it was given, our mean, and what is left of the loss."""
    naive_loss, loss = torch.tensor(losses[rank]), torch.tensor(losses[rank])
    naive = naive_mean(naive_loss)
    ours = get_global_loss_detached(loss, weight=rows[rank])
    return [naive.item(), naive_loss.item(), ours.item(), loss.item()]


def test_the_mean_of_means_is_another_number_and_spoils_the_loss(two_ranks: RankPool) -> None:
    """1000 rows at 4.0 and 10 rows at 1.0 are 3.97 in one process, and 2.5 by the mean of means."""
    for rank, (naive, left, ours, kept) in enumerate(two_ranks.run(mean_of_means, [1000, 10], [4.0, 1.0])):
        assert (naive, left) == (2.5, 2.5)
        assert ours == torch.tensor(4010 / 1010).item()
        assert kept == (4.0, 1.0)[rank]


def with_a_rank_of_weight_0(rank: int, bad: float, kind: str) -> dict[str, float]:
    """The last rank has no rows, so that its mean is not a number."""
    last = rank == dist.get_world_size() - 1
    loss = torch.tensor(bad if last else LOSSES[rank], dtype=torch.float64)
    weight: Any = 0 if last else WEIGHTS[rank]
    if kind == "mapping":
        losses = {"spoilt": loss, "sound": torch.tensor(2.0)}
        result = get_global_loss_detached(losses, weight={"sound": 1, "spoilt": weight})
        return {key: value.item() for key, value in result.items()}
    return {
        "spoilt": get_global_loss_detached(loss, weight=torch.tensor(weight) if kind == "tensor" else weight).item()
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["number", "tensor", "mapping"])
def test_a_rank_of_weight_0_is_left_out_whatever_its_loss(ranks: RankPool, bad: float, kind: str) -> None:
    n = ranks.world_size - 1
    exact = math.fsum(w * x for w, x in zip(WEIGHTS[:n], LOSSES[:n])) / math.fsum(WEIGHTS[:n])
    for result in ranks.run(with_a_rank_of_weight_0, bad, kind):
        assert result == {"spoilt": exact, **({"sound": 2.0} if kind == "mapping" else {})}


def mixed_mapping(rank: int, weighted: bool) -> tuple[dict[str, Any], list[str]]:
    """Losses of several shapes and dtypes through one collective."""
    losses = {
        "loss": torch.tensor(LOSSES[rank], requires_grad=True),
        "half": torch.full((2, 2), 60000.0, dtype=torch.float16),
        "none": torch.zeros(0),
        "fine": torch.tensor([1.0 + rank * 2.0**-40], dtype=torch.float64),
    }
    weight: Any = None
    if weighted:
        weight = {"none": 1, "loss": WEIGHTS[rank], "fine": 1.0, "half": torch.tensor([[1.0, 0.0], [float(rank), 3.0]])}
    before, count = snapshot(losses), CollectiveLog()
    with count:
        result = get_global_loss_detached(losses, weight=weight)
    assert list(result) == list(losses)
    assert snapshot(losses) == before
    for key, loss in losses.items():
        assert (result[key].shape, result[key].dtype, result[key].requires_grad) == (loss.shape, loss.dtype, False)
    return {key: value.tolist() for key, value in result.items()}, count.names


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mapping_takes_one_collective_and_no_loss_its_neighbours_precision(ranks: RankPool, weighted: bool) -> None:
    n = ranks.world_size
    weights = WEIGHTS[:n] if weighted else [1.0] * n
    exact = math.fsum(w * x for w, x in zip(weights, LOSSES)) / math.fsum(weights)
    for result, collectives in ranks.run(mixed_mapping, weighted):
        assert collectives == ["c10d.allreduce_.default"]
        assert result["loss"] == torch.tensor(exact).item()
        assert result["fine"] == [1.0 + (n - 1) / 2 * 2.0**-40]
        assert result["none"] == []
        # 60000 + 60000 is inf in float16. No rank counts where all weights are 0.
        assert str(result["half"]) == str([[60000.0, math.nan if weighted else 60000.0], [60000.0, 60000.0]])


def in_another_order(rank: int) -> dict[str, float]:
    """Each rank builds its mapping in an order of its own."""
    losses = {"like": torch.tensor(float(rank)), "reply": torch.tensor(10.0 + rank)}
    result = get_global_loss_detached(losses if rank == 0 else dict(reversed(losses.items())))
    return {key: value.item() for key, value in result.items()}


def test_the_order_of_a_mapping_does_not_matter(two_ranks: RankPool) -> None:
    assert two_ranks.run(in_another_order) == [{"like": 0.5, "reply": 10.5}] * 2


def in_a_group(rank: int) -> list[float] | None:
    """The mean, the sum and the weighted mean over ranks 1 and 2."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    loss = torch.tensor(LOSSES[rank], dtype=torch.float64)
    ways: list[dict[str, Any]] = [{}, {"reduction": "sum"}, {"weight": WEIGHTS[rank]}]
    return [over_ranks(loss, process_group=group, **way).item() for way in ways]


def test_a_process_group_limits_the_ranks(three_ranks: RankPool) -> None:
    exact = [-0.375, -0.75, (10 * 0.5 - 3 * 1.25) / 13]
    assert three_ranks.run(in_a_group) == [None, exact, exact]
