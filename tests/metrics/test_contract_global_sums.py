"""What every metric promises of a checkpoint that is saved within ``global_sums()``: it suits any number of ranks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric, MetricCollection

from benchmarks.counts import CollectiveLog
from tests.support.metrics import (
    KEY,
    Batch,
    Kind,
    Summing,
    expect_result_of,
    numbers_of_this_rank,
    of_every_kind,
    persistent,
)
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality, global_sums

State = dict[str, Any]
Numbers = dict[str, float]


def saved_batches(kind: Kind, rank: int) -> list[Batch]:
    """What a rank has seen before it saves; the second rank has seen nothing."""
    return [] if rank == 1 else kind.batches(3 + rank, seed=100 * rank)


def later_batches(kind: Kind, rank: int, count: int) -> list[Batch]:
    """What a rank sees after it has loaded."""
    return kind.batches(count, seed=1000 + 100 * rank)


def expected(kind: Kind, saved: list[list[Batch]], later: list[list[Batch]], of: int | None = None) -> Numbers:
    """The oracle's result, of so many ranks; in the window, an update that is saved ages as the first rank goes on."""
    plain = kind.without_windows()

    def of_all(ranks: list[list[Batch]]) -> Numbers:
        return plain.expected([batch for rank in ranks for batch in rank])

    result = of_all([*saved, *later])
    if not (kind.window or kind.window_rows):
        return result
    ranks = of or len(later)
    of_the_file = [kind.latest(rank, len(saved), later[0], ranks) for rank in saved]
    recent = of_all([*of_the_file, *(kind.latest(rank, ranks) for rank in later)])
    return {**result, **{f"window_{key}": value for key, value in recent.items()}}


def save(rank: int, kind: Kind) -> tuple[State, bool, int, Numbers]:
    """The state of all ranks, whether the sums stayed, the collectives that it took, and the result."""
    metric = fed(persistent(kind), saved_batches(kind, rank))
    before = metric.totals.clone()
    with CollectiveLog() as log, global_sums(metric):
        state, again = metric.state_dict(), metric.state_dict()
    assert torch.equal(state[KEY], again[KEY])
    assert state[KEY].data_ptr() != again[KEY].data_ptr()
    return state, torch.equal(metric.totals, before), len(log.names), numbers(metric.compute())


def load(rank: int, kind: Kind, state: State, first_only: bool, counts: list[int]) -> list[Numbers]:
    """Results after the load, and after so many further updates on each rank, and after a save and a load of that."""
    metric = persistent(kind)
    if rank == 0 or not first_only:
        metric.load_state_dict(state)
    results, done = [numbers(metric.compute())], 0
    for count in counts:
        fed(metric, later_batches(kind, rank, count)[done:])
        done = count
        results.append(numbers(metric.compute()))
    with global_sums(metric):
        state = metric.state_dict()
    again = persistent(kind)
    again.load_state_dict(state)
    results.append(numbers(again.compute()))
    for each in (metric, again):
        each.reset()
        fed(each, later_batches(kind, rank, 2))
        results.append(numbers(each.compute()))
    return results


@of_every_kind
def test_a_file_of_all_ranks_is_resumed_on_any_number_of_them(ranks: RankPool, kind: Kind) -> None:
    pools = {1: None, ranks.world_size: ranks}
    answers = ranks.run(save, kind)
    states = [state for state, *_ in answers]
    saved = [saved_batches(kind, rank) for rank in range(ranks.world_size)]
    for state, stayed, collectives, found in answers:
        assert torch.equal(state[KEY], states[0][KEY])
        assert (stayed, collectives) == (True, 1)
        assert_close(found, kind.expected(*saved))
    counts = [1, 2, 3]
    for world_size, pool in pools.items():
        for first_only in (False, True):
            arguments = kind, states[-1], first_only, counts
            for results in [load(0, *arguments)] if pool is None else pool.run(load, *arguments):
                for found, count in zip(results, [0, *counts, counts[-1]]):
                    later = [later_batches(kind, rank, count) for rank in range(world_size)]
                    assert_close(found, expected(kind, saved, later))
                for found in results[-2:]:
                    assert_close(found, kind.expected(*(later_batches(kind, rank, 2) for rank in range(world_size))))


@of_every_kind
def test_two_ranks_go_on_as_three_and_as_one_and_a_file_of_one_process_is_of_all(
    two_ranks: RankPool, three_ranks: RankPool, kind: Kind
) -> None:
    saved = [saved_batches(kind, rank) for rank in range(2)]
    state = two_ranks.run(save, kind)[0][0]
    metric = persistent(kind)
    metric.load_state_dict(state)
    fed(metric, later_batches(kind, 0, 1))
    for first_only in (False, True):
        for found in three_ranks.run(load, kind, state, first_only, [1]):
            assert_close(found[1], expected(kind, saved, [later_batches(kind, rank, 1) for rank in range(3)]))
        for found in three_ranks.run(load, kind, metric.state_dict(), first_only, []):
            assert_close(found[0], expected(kind, saved, [later_batches(kind, 0, 1)]))


def go_on_unevenly(rank: int, kind: Kind, state: State) -> Numbers:
    metric = persistent(kind)
    metric.load_state_dict(state)
    return numbers(fed(metric, later_batches(kind, rank, [1, 3][rank])).compute())


@of_every_kind
def test_ranks_go_on_with_different_numbers_of_updates(two_ranks: RankPool, kind: Kind) -> None:
    """What they carry is one file's, also where more of it has left the one rank's window."""
    saved = [saved_batches(kind, rank) for rank in range(2)]
    state = two_ranks.run(save, kind)[0][0]
    later = [later_batches(kind, rank, count) for rank, count in enumerate([1, 3])]
    for found in two_ranks.run(go_on_unevenly, kind, state):
        assert_close(found, expected(kind, saved, later))


def load_where_there_is_no_group_yet(rank: int, kind: Kind, state: State, store: str) -> Numbers:
    """As a framework does that loads before it starts its ranks."""
    world_size = dist.get_world_size()
    dist.destroy_process_group()
    metric = fed(persistent(kind), kind.batches(1))
    metric.load_state_dict(state)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    fed(metric, later_batches(kind, rank, 1))
    return numbers(metric.compute())


def test_a_load_may_come_before_the_process_group(two_ranks: RankPool, tmp_path: Any) -> None:
    kind = Kind(RankingQuality, window=2)
    state = two_ranks.run(save, kind)[0][0]
    pool = RankPool(2)
    try:
        for found in pool.run(load_where_there_is_no_group_yet, kind, state, str(tmp_path / "store")):
            saved = [saved_batches(kind, rank) for rank in range(2)]
            assert_close(found, expected(kind, saved, [later_batches(kind, rank, 1) for rank in range(2)]))
    finally:
        pool.stop()


# What else may happen to the sums that are carried.


def carrying(kind: Kind) -> Summing:
    """A metric that has loaded two batches and seen a third."""
    saved = fed(persistent(kind), kind.batches(2)).state_dict()
    metric = persistent(kind)
    metric.load_state_dict(saved)
    return fed(metric, kind.batches(3)[2:])


WHAT_HAPPENS: dict[str, Callable[[Summing], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda metric: pickle.loads(pickle.dumps(metric)),
    "casts": lambda metric: metric.half().double().set_dtype(torch.float16).to(torch.bfloat16),
    "a module": lambda metric: next(iter(nn.ModuleList([metric]).float().half())),
    "merge": lambda metric: merged(metric, metric.metric_state),
    "a copy's merge": lambda metric: merged(metric, copy.deepcopy(metric)),
}


def merged(metric: Summing, state: Any) -> Summing:
    """A fresh metric of the same kind, with the state merged into it."""
    fresh = copy.deepcopy(metric)
    fresh.reset()
    fresh.merge_state(state)
    return fresh


@of_every_kind
@pytest.mark.parametrize("what", WHAT_HAPPENS.values(), ids=WHAT_HAPPENS)
def test_carried_sums_survive_what_the_others_do(kind: Kind, what: Callable[[Summing], Any]) -> None:
    metric = what(carrying(kind))
    expect_result_of(kind, metric, kind.batches(3))
    again = persistent(kind)
    again.load_state_dict(metric.state_dict())
    expect_result_of(kind, again, kind.batches(3))
    expect_result_of(kind, fed(metric, kind.batches(5)[3:]), kind.batches(5))


def test_a_copy_saves_its_own_sums() -> None:
    kind = Kind(RankingQuality)
    metric = carrying(kind)
    for twin in (copy.copy(metric), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        fed(twin, kind.batches(4)[3:])
        again = persistent(kind)
        again.load_state_dict(twin.state_dict())
        expect_result_of(kind, again, kind.batches(4))
        metric.reset()
        assert again.update_count == 4
        metric = carrying(kind)


def test_a_view_that_was_reset_is_of_what_comes_after() -> None:
    kind = Kind(RankingQuality)
    metric = carrying(kind)
    view = metric.scalar("logloss/like")
    view.reset()
    fed(metric, kind.batches(5)[3:])
    assert view.compute().item() == pytest.approx(kind.expected(kind.batches(5)[3:])["logloss/like"], rel=1e-12)


def test_metrics_that_a_collection_updates_as_one_carry_as_one() -> None:
    """A compute group's metrics share the tensor of the first."""
    kind = Kind(RankingQuality)

    def make() -> MetricCollection:
        collection = MetricCollection({"a": kind.make(), "b": kind.make()})
        collection.persistent(True)
        collection.update(*kind.batch(0))
        return collection

    stopped = make()
    assert len(stopped.compute_groups) == 1
    stopped.compute()
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    resumed.update(*kind.batch(1))
    found = numbers(resumed.compute())
    for name in ("a", "b"):
        part = {key.removeprefix(f"{name}_"): value for key, value in found.items() if key.startswith(f"{name}_")}
        part = part or found
        assert_close(part, kind.expected(kind.batches(2)))


def parts_of_ranks(rank: int, kind: Kind, state: State) -> tuple[State, Numbers, Numbers]:
    """The metric_state, the result of this rank alone, and that of all within sync()."""
    metric = persistent(kind)
    metric.load_state_dict(state)
    fed(metric, later_batches(kind, rank, 1))
    with metric.sync_context():
        synced = numbers(metric.compute())
        saved = metric.state_dict()
    alone = numbers_of_this_rank(metric)
    assert_close(numbers(metric.compute()), synced)
    again = persistent(kind)
    again.load_state_dict(saved)
    assert_close(numbers(again.compute()), synced)
    return metric.metric_state, alone, synced


@of_every_kind
def test_the_parts_of_all_ranks_add_up(two_ranks: RankPool, kind: Kind) -> None:
    """What the file brought is in that of the first; what is saved between sync() and unsync() is of all ranks."""
    saved = [kind.batches(3)]
    state = fed(persistent(kind), saved[0]).state_dict()
    later = [later_batches(kind, rank, 1) for rank in range(2)]
    answers = two_ranks.run(parts_of_ranks, kind, state)
    total = kind.make()
    for part, _, synced in answers:
        total.merge_state(part)
        assert_close(synced, expected(kind, saved, later))
    plain = {key: value for key, value in expected(kind, saved, later).items() if not key.startswith("window")}
    assert_close({key: value for key, value in numbers(total.compute()).items() if key in plain}, plain)
    assert_close(answers[0][1], expected(kind, saved, later[:1], of=2))
    assert_close(answers[1][1], kind.expected(later[1], of=2))


# Refused, or not.


def load_on(rank: int, kind: Kind, states: list[State | None]) -> tuple[str, bool, Numbers]:
    """What compute() raises after each rank has loaded another file, whether the sums stayed, and after reset()."""
    metric, message = fed(persistent(kind), later_batches(kind, rank, 1)), ""
    if (state := states[rank]) is not None:
        metric.load_state_dict(state)
    before = metric.totals.clone()
    for ask in (metric.compute, metric.compute_async().wait, metric.sync, global_sums(metric).__enter__):
        try:
            ask()
        except RuntimeError as error:
            message = str(error)
        else:
            message = "nothing was raised"
            break
    stayed = torch.equal(metric.totals, before) and not metric._is_synced
    metric.reset()
    return message, stayed, numbers(fed(metric, later_batches(kind, rank, 1)).compute())


@of_every_kind
def test_what_the_first_rank_does_not_carry_is_an_error_on_every_rank(two_ranks: RankPool, kind: Kind) -> None:
    one, other = (fed(persistent(kind), kind.batches(count)).state_dict() for count in (2, 3))
    later = [later_batches(kind, rank, 1) for rank in range(2)]
    for states in ([None, one], [one, other]):
        for message, stayed, after in two_ranks.run(load_on, kind, states):
            assert "loaded on all ranks or on the first" in message
            assert stayed
            assert_close(after, kind.expected(*later))


def carry_in_a_group(rank: int, kind: Kind, state: State) -> tuple[Numbers, State]:
    """The last two of three ranks load a file; the result, and what they save."""
    group = dist.new_group([1, 2])
    metric = persistent(kind, process_group=group)
    metric.load_state_dict(state)
    if rank == 0:
        with global_sums(metric):  # no part of the group, so that it has nothing to wait for
            assert metric.state_dict().keys() == {KEY}
        return {}, {}
    fed(metric, later_batches(kind, rank, 1))
    with global_sums(metric):
        state = metric.state_dict()
    return numbers(metric.compute()), state


@of_every_kind
def test_in_a_group_its_own_first_rank_adds_them(three_ranks: RankPool, kind: Kind) -> None:
    saved = [kind.batches(3)]
    state = fed(persistent(kind), saved[0]).state_dict()
    later = [later_batches(kind, rank, 1) for rank in (1, 2)]
    for found, state_of_all in three_ranks.run(carry_in_a_group, kind, state)[1:]:
        assert_close(found, expected(kind, saved, later))
        metric = persistent(kind)
        metric.load_state_dict(state_of_all)
        assert_close(numbers(metric.compute()), found)


def state_in_a_group(rank: int, state: State) -> list[float]:
    """The sums of a loss, with their counters, that a rank of the last two adds to those of the group."""
    metric = GlobalLoss(None, process_group=dist.new_group([1, 2]))
    metric.persistent(True)
    metric.load_state_dict(state)
    metric.update(torch.tensor(10.0 * rank), 1)
    totals: list[float] = metric.metric_state["totals"].sum((0, 1)).flatten().tolist()
    return totals


def test_in_a_group_the_state_of_its_own_first_rank_has_what_is_carried(three_ranks: RankPool) -> None:
    metric = GlobalLoss(None)
    metric.persistent(True)
    metric.update(torch.tensor(3.0), 5)
    first, second = three_ranks.run(state_in_a_group, metric.state_dict())[1:]
    assert (first, second) == ([13.0, 6.0, 2.0, 2.0], [20.0, 1.0, 1.0, 1.0])


class Model(nn.Module):
    """A model with a loss, and a metric of torchmetrics' own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2)
        self.loss = MultiTaskLoss("bce_with_logits", ["a", "b"], quality=True)
        self.same = self.loss
        self.mean = MeanMetric()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The global loss."""
        loss: torch.Tensor = self.loss(self.heads(features), features[:, :2].sigmoid())["loss"]
        return loss


@pytest.mark.parametrize("wrong", [None, {}, "model"])
def test_what_is_no_module_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"module: got .*, expected an nn\.Module"), global_sums(wrong):
        pass


def test_a_module_that_saves_no_sums_is_refused() -> None:
    model = Model()
    for module in (nn.Linear(1, 1), model, model.loss.train_metric):
        with pytest.raises(ValueError, match=r"module: got .* persistent\(True\)"), global_sums(module):
            pass


def train_and_save(rank: int) -> list[Any]:
    """Names that are saved, collectives, and updates within; whether another metric stayed."""
    torch.manual_seed(0)
    model = Model()
    model.mean.persistent(True)
    model.loss.train_metric.persistent(True)
    model.loss.eval_quality.persistent(True)
    wrapped = DistributedDataParallel(model)
    features = torch.randn(4 + rank, 3)
    for _ in range(2):
        wrapped(features)
    model.eval()
    model(features)
    model.mean.update(float(rank + 1), 4 + rank)
    with CollectiveLog() as log, global_sums(wrapped):
        model.train()
        state = wrapped.state_dict()
        model(features)
        with global_sums(model):  # of now, and after it that of before
            inner = wrapped.state_dict()
        after = wrapped.state_dict()
    key = "module.loss.train_metric.sums._extra_state"
    assert torch.equal(after[key], state[key])
    assert not torch.equal(inner[key], state[key])
    assert not torch.equal(wrapped.state_dict()[key], inner[key])
    counts = model.loss.train_metric.update_count, model.loss.eval_quality.update_count
    return [sorted(state), len(log.names), counts, state["module.mean.mean_value"].item()]


def test_each_persistent_metric_of_a_wrapped_model_is_saved_once(two_ranks: RankPool) -> None:
    for rank, (names, collectives, counts, mean) in enumerate(two_ranks.run(train_and_save)):
        sums = [
            f"module.{loss}.{metric}.{KEY}" for loss in ("loss", "same") for metric in ("eval_quality", "train_metric")
        ]
        others = [f"module.{name}" for name in ("heads.bias", "heads.weight", "mean.mean_value", "mean.weight")]
        assert names == sorted([*sums, *others])
        assert collectives == 4
        assert counts == (3, 1)
        assert mean == (rank + 1) * (4 + rank)


def fail_within(rank: int) -> list[str]:
    """Errors within, and while it is entered, leave no copy behind."""
    messages = []
    metrics = [persistent(Kind(RankingQuality, names)) for names in (("a",), (f"of rank {rank}",))]
    for metric in metrics:
        metric.update(torch.zeros(3, 1), torch.ones(3, 1))
    local = metrics[0].state_dict()[KEY]
    for module in (metrics[0], nn.ModuleList(metrics)):
        with ExitStack() as stack:
            try:
                stack.enter_context(global_sums(module))
                raise OSError("no space left")
            except (OSError, RuntimeError) as error:
                messages.append(str(error))
        assert torch.equal(metrics[0].state_dict()[KEY], local)
    return messages


def test_an_error_leaves_the_sums_and_what_is_saved_of_them(two_ranks: RankPool) -> None:
    for rank, (within, entering) in enumerate(two_ranks.run(fail_within)):
        assert within == "no space left"
        assert f"of rank {rank}" in entering
