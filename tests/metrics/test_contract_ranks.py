"""What every metric promises over ranks: the result of the rows of all of them, in one collective."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.counts import CollectiveLog
from tests.support.metrics import (
    Ask,
    Batch,
    Kind,
    Summing,
    either_way,
    expect_result_of,
    jointly,
    numbers_of_this_rank,
    of_every_kind,
)
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import compute_all

ONE_COLLECTIVE = ["c10d.allreduce_.default"]
# How many batches each rank has.
UNEVEN = {2: [3, 1], 3: [2, 4, 1]}
ONE_WITHOUT = {2: [0, 3], 3: [3, 1, 0]}
SPLITS = pytest.mark.parametrize("counts", [UNEVEN, ONE_WITHOUT], ids=["uneven", "a rank without a batch"])

Result = dict[str, float]
ByRank = list[list[Batch]]


def batches_of(kind: Kind, counts: Sequence[int]) -> ByRank:
    """The batches of each rank."""
    return [kind.batches(count, seed=100 * rank) for rank, count in enumerate(counts)]


def expect_on_every_rank(found: Sequence[Result], oracle: Result) -> None:
    """The oracle's result, to the last bit the same on all ranks."""
    for each in found:
        assert_close(each, oracle)
        assert repr(each) == repr(found[0])


def compute_twice(rank: int, kind: Kind, batches: ByRank, ask: Ask) -> dict[str, Any]:
    metric = kind.make()
    logs = [CollectiveLog() for _ in range(3)]
    with logs[0]:
        fed(metric, batches[rank])
    before = metric.totals.clone()
    results = []
    for log in logs[1:]:
        with log:
            results.append(numbers(ask(metric)))
    return {
        "collectives": [log.names for log in logs],
        "results": results,
        "kept": torch.equal(metric.totals, before) and metric.update_count == len(batches[rank]),
        "own": numbers_of_this_rank(metric) if batches[rank] else None,
    }


@of_every_kind
@SPLITS
@either_way
def test_compute_is_of_all_ranks_in_one_collective_and_keeps_the_local_sums(
    ranks: RankPool, kind: Kind, counts: dict[int, list[int]], ask: Ask
) -> None:
    batches = batches_of(kind, counts[ranks.world_size])
    answers = ranks.run(compute_twice, kind, batches, ask)
    for answer, own in zip(answers, batches):
        assert answer["collectives"] == [[], ONE_COLLECTIVE, ONE_COLLECTIVE]
        assert answer["kept"]
        if own:
            assert_close(answer["own"], kind.expected(own, of=ranks.world_size))
    for which in range(2):
        expect_on_every_rank([answer["results"][which] for answer in answers], kind.expected(*batches))


def compute_without_data(rank: int, kind: Kind, ask: Ask) -> tuple[Result, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return numbers(ask(kind.make())), [str(warning.message) for warning in caught]


@of_every_kind
@either_way
def test_without_data_on_any_rank_compute_says_so(two_ranks: RankPool, kind: Kind, ask: Ask) -> None:
    answers = two_ranks.run(compute_without_data, kind, ask)
    expect_on_every_rank([found for found, _ in answers], kind.expected())
    # A launcher's variables tell torchmetrics which rank is the one to speak; here there are none.
    for _, messages in answers:
        assert len(messages) == 1
        assert "before update() on any rank" in messages[0]


def sync_by_hand(rank: int, kind: Kind, batches: ByRank, ask: Ask) -> dict[str, Any]:
    metric = fed(kind.make(), batches[rank])
    before = metric.totals.clone()
    with CollectiveLog() as of_sync:
        metric.sync()
    with CollectiveLog() as of_compute:
        synced = numbers(ask(metric))
    metric.unsync()
    with CollectiveLog() as of_context, metric.sync_context():
        within = numbers(ask(metric))
    return {
        "collectives": [log.names for log in (of_sync, of_compute, of_context)],
        "results": [synced, within],
        "kept": torch.equal(metric.totals, before) and metric.update_count == len(batches[rank]),
    }


@of_every_kind
@SPLITS
@either_way
def test_what_is_synced_by_hand_is_of_all_ranks_until_it_is_unsynced(
    ranks: RankPool, kind: Kind, counts: dict[int, list[int]], ask: Ask
) -> None:
    batches = batches_of(kind, counts[ranks.world_size])
    answers = ranks.run(sync_by_hand, kind, batches, ask)
    for answer in answers:
        assert answer["collectives"] == [ONE_COLLECTIVE, [], ONE_COLLECTIVE]
        assert answer["kept"]
    for which in range(2):
        expect_on_every_rank([answer["results"][which] for answer in answers], kind.expected(*batches))


def leave_a_context_by_an_error(rank: int, kind: Kind, batches: ByRank) -> tuple[bool, Result]:
    metric = fed(kind.make(), batches[rank])
    before = metric.totals.clone()
    with pytest.raises(ZeroDivisionError), metric.sync_context():
        raise ZeroDivisionError
    return torch.equal(metric.totals, before), numbers(metric.compute())


@of_every_kind
def test_an_error_within_a_sync_context_brings_the_local_sums_back(two_ranks: RankPool, kind: Kind) -> None:
    batches = batches_of(kind, UNEVEN[2])
    answers = two_ranks.run(leave_a_context_by_an_error, kind, batches)
    assert [kept for kept, _ in answers] == [True, True]
    expect_on_every_rank([found for _, found in answers], kind.expected(*batches))


def forward_over_ranks(rank: int, kind: Kind, batches: ByRank) -> tuple[list[Result], Result]:
    metric = kind.make(dist_sync_on_step=True)
    return [numbers(metric(*batch)) for batch in batches[rank]], numbers(metric.compute())


@of_every_kind
def test_with_dist_sync_on_step_forward_gives_the_batch_of_all_ranks(ranks: RankPool, kind: Kind) -> None:
    batches = batches_of(kind, [2] * ranks.world_size)
    answers = ranks.run(forward_over_ranks, kind, batches)
    for step in range(2):
        oracle = kind.expected(*([rank[step]] for rank in batches))
        expect_on_every_rank([steps[step] for steps, _ in answers], oracle)
    expect_on_every_rank([found for _, found in answers], kind.expected(*batches))


def by_compute(metric: Summing) -> None:
    metric.compute()


def by_a_joint_call(metric: Summing) -> None:
    jointly(metric)


def by_sync(metric: Summing) -> None:
    metric.sync()
    metric.compute()
    metric.unsync()


def by_context(metric: Summing) -> None:
    with metric.sync_context():
        metric.compute()


def read_in_inference_mode(
    rank: int, kind: Kind, batches: ByRank, read: Callable[[Summing], None]
) -> tuple[bool, Result]:
    metric = fed(kind.make(), batches[rank][:-1])
    before = metric.totals.clone()
    with torch.inference_mode():
        read(metric)
    kept = torch.equal(metric.totals, before)
    metric.update(*batches[rank][-1])
    return kept, numbers(metric.compute())


@of_every_kind
@pytest.mark.parametrize("read", [by_compute, by_a_joint_call, by_sync, by_context])
def test_reading_in_inference_mode_does_not_spoil_the_updates_that_follow(
    two_ranks: RankPool, kind: Kind, read: Callable[[Summing], None]
) -> None:
    batches = batches_of(kind, [3, 2])
    answers = two_ranks.run(read_in_inference_mode, kind, batches, read)
    assert [kept for kept, _ in answers] == [True, True]
    expect_on_every_rank([found for _, found in answers], kind.expected(*batches))


def compute_in_a_group(rank: int, kind: Kind, batches: ByRank, ask: Ask) -> Result | None:
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    return numbers(ask(fed(kind.make(process_group=group), batches[rank])))


@of_every_kind
@either_way
def test_a_process_group_limits_the_ranks(three_ranks: RankPool, kind: Kind, ask: Ask) -> None:
    batches = batches_of(kind, UNEVEN[3])
    first, none, last = three_ranks.run(compute_in_a_group, kind, batches, ask)
    assert none is None
    expect_on_every_rank([first, last], kind.expected(batches[0], batches[2]))


def sync_in_a_group(rank: int, kind: Kind, batches: ByRank) -> tuple[Result, Result]:
    """What a sync over the ranks 0 and 1 gives, or a rank's own; and what compute() gives of all after it."""
    group = dist.new_group([0, 1])
    metric = fed(kind.make(), batches[rank])
    if rank == 2:
        return numbers_of_this_rank(metric), numbers(metric.compute())
    metric.sync(process_group=group)
    synced = numbers(metric.compute())
    metric.unsync()
    return synced, numbers(metric.compute())


@of_every_kind
def test_a_sync_over_a_group_is_of_its_ranks_alone(three_ranks: RankPool, kind: Kind) -> None:
    batches = batches_of(kind, UNEVEN[3])
    answers = three_ranks.run(sync_in_a_group, kind, batches)
    synced = [found for found, _ in answers]
    expect_on_every_rank(synced[:2], kind.expected(batches[0], batches[1], of=3))
    assert_close(synced[2], kind.expected(batches[2], of=3))
    expect_on_every_rank([found for _, found in answers], kind.expected(*batches))


def copies_with_a_group(rank: int, kind: Kind) -> tuple[list[bool], list[Result], bytes]:
    group = dist.new_group([0, 1])
    metric = fed(kind.make(process_group=group), kind.batches(2))
    twins = [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()]
    return (
        [twin.process_group is group for twin in twins],
        [numbers(twin.compute()) for twin in twins],
        pickle.dumps(metric),
    )


@of_every_kind
def test_copies_keep_the_process_group_and_a_process_without_it_is_told_so(two_ranks: RankPool, kind: Kind) -> None:
    for same, results, pickled in two_ranks.run(copies_with_a_group, kind):
        assert same == [True] * 3
        expect_on_every_rank(results, kind.expected(kind.batches(2), kind.batches(2)))
        with pytest.warns(UserWarning, match="process_group"):
            elsewhere = pickle.loads(pickled)
        assert (elsewhere.process_group, elsewhere.update_count) == (None, 2)


def gather_in_order(values: Tensor, group: Any = None) -> list[Tensor]:
    """A sync function of one's own."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return parts


def compute_with_own_sync(rank: int, kind: Kind, batches: ByRank, ask: Ask) -> tuple[list[str], Result]:
    metric = fed(kind.make(dist_sync_fn=gather_in_order), batches[rank])
    with CollectiveLog() as log:
        result = numbers(ask(metric))
    return log.names, result


@of_every_kind
@either_way
def test_a_dist_sync_fn_of_the_users_is_honoured(two_ranks: RankPool, kind: Kind, ask: Ask) -> None:
    batches = batches_of(kind, UNEVEN[2])
    answers = two_ranks.run(compute_with_own_sync, kind, batches, ask)
    assert [names for names, _ in answers] == [["c10d.allgather_.default"]] * 2
    expect_on_every_rank([found for _, found in answers], kind.expected(*batches))


def thrice(values: Tensor, group: Any = None) -> list[Tensor]:
    """A sync function that brings what two others saw, who saw the same."""
    return [values] * 3


@of_every_kind
def test_a_dist_sync_fn_may_bring_the_sums_of_others_than_the_ranks(kind: Kind) -> None:
    """As one does that reads those of other jobs from files."""
    batches = kind.batches(2)
    metric = kind.make(dist_sync_fn=thrice, distributed_available_fn=lambda: True)
    expect_result_of(kind, fed(metric, batches), batches, batches, batches, of=1)
    assert_close(numbers(jointly(metric)), kind.expected(batches, batches, batches, of=1))


def compute_alone_first(rank: int, kind: Kind, batches: ByRank) -> Result:
    """Rank 0 has asked for its own result twice; the other has not."""
    metric = fed(kind.make(), batches[rank])
    for _ in range(2 if rank == 0 else 0):
        numbers_of_this_rank(metric)
    return numbers(metric.compute())


@of_every_kind
def test_no_rank_waits_because_another_has_computed_before(two_ranks: RankPool, kind: Kind) -> None:
    """Nothing is cached."""
    batches = batches_of(kind, UNEVEN[2])
    expect_on_every_rank(two_ranks.run(compute_alone_first, kind, batches), kind.expected(*batches))


# What goes wrong.


def compute_what_is_not_finite(rank: int, kind: Kind, batches: ByRank, ask: Ask) -> tuple[str, bool, Result]:
    """An error on all ranks, after which the metric can be used."""
    metric = fed(kind.make(nan_strategy="error"), batches[rank])
    before = metric.totals.clone()
    with pytest.raises(RuntimeError, match="not finite") as caught:
        ask(metric)
    metric.nan_strategy = "ignore"
    return str(caught.value), torch.equal(metric.totals, before), numbers(ask(metric))


@of_every_kind
@either_way
def test_a_batch_that_is_not_finite_on_one_rank_is_an_error_on_all(two_ranks: RankPool, kind: Kind, ask: Ask) -> None:
    given = batches_of(kind, UNEVEN[2])
    clean = [given[0], [*given[1], kind.without_last_task(given[1][0])]]
    given[1].append(kind.changed(given[1][0], 0, float("nan")))
    answers = two_ranks.run(compute_what_is_not_finite, kind, given, ask)
    for message, kept, _ in answers:
        assert message.endswith(f"not finite: {kind.names()[-1]}: 1")
        assert kept
    expect_on_every_rank([found for *_, found in answers], kind.expected(*clean))


def fail_in_the_collective(rank: int, kind: Kind, batches: ByRank) -> tuple[bool, Result]:
    metric = fed(kind.make(), batches[rank])
    before = metric.totals.clone()
    whole = dist.all_reduce

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the network is down")

    dist.all_reduce = broken
    try:
        for call in (
            metric.compute,
            partial(compute_all, metric),
            partial(compute_all, metric, reset=True),
            metric.sync,
        ):
            with pytest.raises(RuntimeError, match="the network is down"):
                call()
    finally:
        dist.all_reduce = whole
    kept = torch.equal(metric.totals, before)
    metric.update(*batches[rank][0])
    return kept, numbers(metric.compute())


@of_every_kind
def test_a_collective_that_fails_leaves_the_local_sums(two_ranks: RankPool, kind: Kind) -> None:
    batches = batches_of(kind, UNEVEN[2])
    answers = two_ranks.run(fail_in_the_collective, kind, batches)
    assert [kept for kept, _ in answers] == [True, True]
    expect_on_every_rank([found for _, found in answers], kind.expected(*([*rank, rank[0]] for rank in batches)))


def spoil_and_fail(values: Tensor, *_: Any, **__: Any) -> Any:
    """A collective that fails when it has already written."""
    values.fill_(math.nan)
    raise RuntimeError("the network is down")


@of_every_kind
@pytest.mark.parametrize("of_the_users", [False, True], ids=["torch's", "the user's"])
def test_a_collective_that_fails_halfway_leaves_the_local_sums(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, of_the_users: bool
) -> None:
    batches = kind.batches(4)
    is_distributed = {"value": True}
    metric = kind.make(
        dist_sync_fn=spoil_and_fail if of_the_users else None, distributed_available_fn=lambda: is_distributed["value"]
    )
    if not of_the_users:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda _: 0)
        monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
        monkeypatch.setattr(dist, "all_reduce", spoil_and_fail)
    fed(metric, batches[:3])
    before = metric.totals.clone()
    for reset in (False, True):
        with pytest.raises(RuntimeError, match="the network is down"):
            metric.compute()
        with pytest.raises(RuntimeError, match="the network is down"):
            compute_all(metric, reset=reset)
        with pytest.raises(RuntimeError, match="the network is down"):
            metric.sync(dist_sync_fn=spoil_and_fail if of_the_users else None)
        with (
            pytest.raises(RuntimeError, match="the network is down"),
            metric.sync_context(dist_sync_fn=spoil_and_fail if of_the_users else None),
        ):
            raise AssertionError
        assert torch.equal(metric.totals, before)
    is_distributed["value"] = False
    expect_result_of(kind, metric, batches[:3], of=1 if of_the_users else 2)
    expect_result_of(kind, fed(metric, batches[3:]), batches, of=1 if of_the_users else 2)


# In a model that DDP wraps.


class Model(nn.Module):
    """A model with a metric as a submodule, and a buffer, so that DDP broadcasts buffers at every forward."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(()))
        self.metric = kind.make()

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the batch's first part, which the metric sees attached to the graph."""
        first, *others = batch
        self.metric.update(self.scale * first, *others)
        return (self.scale * first).sum()


def train_with_ddp(rank: int, kind: Kind, batches: ByRank) -> tuple[int, Result]:
    model = Model(kind)
    ddp = DistributedDataParallel(model)
    for batch in batches[rank]:
        ddp(batch).backward()
    return model.metric.update_count, numbers(model.metric.compute())


@of_every_kind
def test_ddp_does_not_overwrite_the_sums(two_ranks: RankPool, kind: Kind) -> None:
    batches = batches_of(kind, [3, 3])
    answers = two_ranks.run(train_with_ddp, kind, batches)
    assert [count for count, _ in answers] == [3, 3]
    expect_on_every_rank([found for _, found in answers], kind.expected(*batches))
