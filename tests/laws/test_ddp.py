"""The running sums on real ranks: what is synced, at which cost, and what DDP must not do to them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from benchmarks.counts import CollectiveLog
from tests.support import reference
from tests.support.cases import Ranker, Rows, Settings, columns, joined, random_rows, split
from tests.support.rank_pool import RankFailedError, RankPool
from twloss import GlobalLoss, MultiTaskLoss

# Rows by step and rank: uneven, and the last rank has none at all.
UNEVEN = {2: [[3, 0], [10, 0], [1, 0]], 3: [[3, 10, 0], [1, 7, 0], [5, 0, 0]]}


def uneven_steps(case: Settings, world_size: int) -> list[list[Rows]]:
    sizes = UNEVEN[world_size]
    return split(random_rows(case, sum(map(sum, sizes)), 0, weighted=True), sizes)


def train(rank: int, case: Settings, steps: list[list[Rows]]) -> dict[str, float]:
    """Train and evaluate inside DDP; the two metrics' results, in one dict."""
    loss = case.loss()
    ranker = Ranker(loss, case.tasks)
    ranker.register_buffer("scale", torch.ones(()))
    model = DistributedDataParallel(ranker)
    assert model.broadcast_buffers
    for parts in steps:
        model(parts[rank])["loss"].backward()
    model.eval()
    with torch.no_grad():
        model(steps[0][rank])
    results = {"train": loss.train_metric.compute(), "eval": loss.eval_metric.compute()}
    return {f"{mode} {key}": value.item() for mode, result in results.items() for key, value in result.items()}


@pytest.mark.parametrize(
    ("reduction", "fused", "ranks"),
    [("mean", False, 2), ("mean", False, 3), ("max", False, 2), ("max", False, 3), ("mean", True, 2)],
    indirect=["ranks"],
)
def test_sums_of_all_ranks_survive_ddp_with_uneven_batches(ranks: RankPool, reduction: str, fused: bool) -> None:
    case = Settings(global_reduction=reduction, fused=fused)
    steps = uneven_steps(case, ranks.world_size)
    results = ranks.run(train, case, steps)
    everything = {"train": joined([part for parts in steps for part in parts]), "eval": joined(steps[0])}
    expected = {
        f"{mode} {key}": value
        for mode, rows in everything.items()
        for key, value in reference.losses(columns(case, rows), case.rule()).items()
    }
    for result in results:
        assert result == pytest.approx(expected, rel=1e-12)
        assert result == results[0]


class BufferSums(nn.Module):
    """The naive version: sums in registered buffers."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, rows: int) -> Tensor:
        """Count the rows."""
        self.total += rows
        return self.weight.sum() * 0


def count_rows_in_buffers(rank: int) -> float:
    model = DistributedDataParallel(BufferSums())
    for _ in range(3):
        model(8 if rank else 4)
    total: Tensor = model.module.total
    return total.item()


def test_registered_buffers_are_overwritten_by_rank_0(two_ranks: RankPool) -> None:
    """Why the sums are Metric states: rank 1 saw 24 rows."""
    assert two_ranks.run(count_rows_in_buffers)[1] != 24


def collectives_of_a_default_sync(rank: int) -> int:
    metric = MeanMetric()
    metric.update(rank + 1.0)
    with CollectiveLog() as log:
        metric.compute()
    return len(log.names)


def test_a_default_sync_takes_several_collectives(two_ranks: RankPool) -> None:
    """What the counter sees of torchmetrics' own sync, and so why there is another here."""
    assert min(two_ranks.run(collectives_of_a_default_sync)) > 2


def collectives_of_a_step(rank: int, kind: str) -> list[str]:
    """The collectives of forward, and of backward apart."""
    kwargs = {"global_batch": True} if kind == "global_batch" else {}
    loss = MultiTaskLoss("bce_with_logits", ["a", "b", "c"], pos_weights=[1, 2, 3], **kwargs)  # type: ignore[arg-type]
    model = nn.Linear(3, 3)
    ddp = DistributedDataParallel(Ranker(loss, 3, torch.float32) if kind != "bare" else model)
    rows = Rows(torch.randn(4 + rank, 3), torch.rand(4 + rank, 3), torch.rand(4 + rank, 3))
    count = CollectiveLog()
    with count:
        result = ddp(rows.features).sum() if kind == "bare" else ddp(rows)["loss"]
        count.names.append("backward")
        result.backward()
    return count.names


def test_the_loss_adds_no_collective_to_a_step_and_global_batch_one_to_forward(two_ranks: RankPool) -> None:
    bare = two_ranks.run(collectives_of_a_step, "bare")
    assert two_ranks.run(collectives_of_a_step, "plain") == bare
    for names, plain in zip(two_ranks.run(collectives_of_a_step, "global_batch"), bare):
        assert names == ["c10d.allreduce_.default", *plain]


def compute_in_a_subgroup(rank: int) -> float | None:
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    loss = MultiTaskLoss("bce_with_logits", ["x"], process_group=group)
    loss(torch.full((rank, 1), 10.0 * rank, dtype=torch.float64), torch.zeros(rank, 1))
    return loss.train_metric.compute()["loss"].item()


def test_the_process_group_of_a_loss_is_that_of_its_metrics(three_ranks: RankPool) -> None:
    answers = three_ranks.run(compute_in_a_subgroup)
    exact = (reference.softplus(10) + 2 * reference.softplus(20)) / 3
    assert answers[0] is None
    assert answers[1:] == pytest.approx([exact, exact], rel=1e-15)


def fail_on_one_rank(rank: int) -> None:
    if rank == 1:
        raise KeyError("lost")


def test_the_pool_reports_a_ranks_failure_and_goes_on(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1:.*KeyError: 'lost'"):
        two_ranks.run(fail_on_one_rank)
    assert two_ranks.run(rank_itself) == [0, 1]


def rank_itself(rank: int) -> int:
    return rank


def mean_of_means(rank: int, rows: list[int], losses: list[float]) -> tuple[float, float]:
    """The usual way, an all-reduced average of the ranks' means, and ours."""
    naive = torch.tensor(losses[rank])
    dist.all_reduce(naive)
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([rows[rank] * losses[rank]]), rows[rank])
    return naive.item() / dist.get_world_size(), metric.compute()["loss"].item()


def test_the_mean_of_the_ranks_means_is_another_number(two_ranks: RankPool) -> None:
    """Why sums travel: 1000 rows at 0.7 and 10 at 4.0 are 0.73 in one process, and 2.35 by the mean of means."""
    for naive, ours in two_ranks.run(mean_of_means, [1000, 10], [0.7, 4.0]):
        assert naive == pytest.approx(2.35)
        assert ours == pytest.approx(740 / 1010, rel=1e-6)
