"""What every metric promises of checkpoints: its sums travel whole, to the rank they are of, or not at all."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tests.support.metrics import Kind, Summing, expect_result_of, of_every_kind
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers

State = dict[str, Any]


def persistent(kind: Kind) -> Summing:
    metric = kind.make()
    metric.persistent(True)
    return metric


def through_a_file(state: State) -> State:
    """As a checkpoint goes, and as torch.load reads it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


@of_every_kind
def test_a_resumed_metric_is_bit_equal_to_one_that_never_stopped(kind: Kind) -> None:
    batches = kind.batches(6)
    steady, stopped = fed(persistent(kind), batches), fed(persistent(kind), batches[:3])
    resumed = fed(persistent(kind), batches[4:])
    resumed.load_state_dict(through_a_file(stopped.state_dict()))
    expect_result_of(kind, resumed, batches[:3])
    assert resumed.update_count == 3
    fed(resumed, batches[3:])
    assert torch.equal(resumed.totals, steady.totals)
    assert repr(numbers(resumed.compute())) == repr(numbers(steady.compute()))
    expect_result_of(kind, stopped, batches[:3])


@of_every_kind
def test_only_a_persistent_metric_is_saved_under_its_own_names(kind: Kind) -> None:
    metric = fed(kind.make(), kind.batches(2))
    assert metric.state_dict() == {}
    metric.persistent(True)
    assert sorted(metric.state_dict(prefix="metric.")) == ["metric.sums_of", "metric.totals"]
    metric.persistent(False)
    assert metric.state_dict() == {}


@of_every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_and_the_sums_share_no_memory(kind: Kind, assign: bool) -> None:
    batches = kind.batches(4)
    metric = fed(persistent(kind), batches[:2])
    state = metric.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    fresh = persistent(kind)
    fresh.load_state_dict(state, assign=assign)
    for each in (metric, fresh):
        expect_result_of(kind, fed(each, batches[2:]), batches)
        assert all(torch.equal(value, before[key]) for key, value in state.items())


@of_every_kind
def test_a_load_brings_a_metric_from_the_meta_device(kind: Kind) -> None:
    state = fed(persistent(kind), kind.batches(2)).state_dict()
    with torch.device("meta"):
        metric = persistent(kind)
    metric.load_state_dict(state, assign=True)
    expect_result_of(kind, fed(metric, kind.batches(2, seed=2)), kind.batches(4))


@of_every_kind
def test_a_load_between_sync_and_unsync_is_refused(kind: Kind) -> None:
    """unsync() would drop what is loaded."""
    batches = kind.batches(3)
    metric = fed(persistent(kind), batches[:2])
    metric.distributed_available_fn = lambda: True
    metric.sync()
    with pytest.raises(RuntimeError, match=r"totals: between sync\(\) and unsync\(\)"):
        metric.load_state_dict(fed(persistent(kind), batches[2:]).state_dict())
    metric.unsync()
    expect_result_of(kind, metric, batches[:2])


# Refused.


@of_every_kind
def test_sums_of_something_else_are_refused(kind: Kind) -> None:
    batches = kind.batches(3)
    metric = fed(persistent(kind), batches)
    for name, stranger in kind.strangers().items():
        state = fed(persistent(stranger), stranger.batches(2)).state_dict()
        with pytest.raises(RuntimeError, match=r"totals: got .* expected "):
            metric.load_state_dict(state)
        assert metric.update_count == 3, name
        expect_result_of(kind, metric, batches)


def as_text(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


DAMAGED: dict[str, tuple[Callable[[State], State], str]] = {
    "nothing": (lambda _: {}, "totals"),
    "sums of nothing": (lambda state: {"totals": state["totals"]}, "sums_of"),
    "no sums": (lambda state: {"sums_of": state["sums_of"]}, "totals"),
    "shape": (lambda state: {**state, "totals": state["totals"].unsqueeze(0)}, "shape"),
    "dtype": (lambda state: {**state, "totals": state["totals"].float()}, "float32"),
    "meta": (lambda state: {**state, "totals": state["totals"].to("meta")}, "meta"),
    "no tensor": (lambda state: {**state, "totals": state["totals"].tolist()}, "list"),
    "another text": (lambda state: {**state, "sums_of": as_text(b"[1]")}, "sums_of"),
    "no text": (lambda state: {**state, "sums_of": as_text(b"\xff\xfe")}, "sums_of"),
    "a string": (lambda state: {**state, "sums_of": "sums"}, "sums_of"),
}


@of_every_kind
@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(
    kind: Kind, damage: Callable[[State], State], message: str
) -> None:
    metric = fed(persistent(kind), kind.batches(3))
    state = damage(fed(persistent(kind), kind.batches(1)).state_dict())
    with pytest.raises(RuntimeError, match=message):
        metric.load_state_dict(state)
    expect_result_of(kind, metric, kind.batches(3))


# On ranks.


def batches_of_rank(kind: Kind, rank: int) -> list[Any]:
    return kind.batches(2 + rank, seed=100 * rank)


def save_on_each_rank(rank: int, kind: Kind, synced: bool) -> tuple[State, dict[str, float]]:
    """Each rank's state dict, perhaps while the sums are those of all ranks; and the result."""
    metric = fed(persistent(kind), batches_of_rank(kind, rank))
    if synced:
        metric.sync()
    state = through_a_file(metric.state_dict())
    if synced:
        metric.unsync()
    return state, numbers(metric.compute())


def load_on_each_rank(rank: int, kind: Kind, states: list[State]) -> tuple[dict[str, float], int, str]:
    """The result after each rank's own state, its updates, and what the next rank's state raises."""
    metric, message = persistent(kind), ""
    metric.load_state_dict(states[rank])
    try:
        metric.load_state_dict(states[(rank + 1) % len(states)])
    except RuntimeError as error:
        message = str(error)
    return numbers(metric.compute()), metric.update_count, message


@of_every_kind
@pytest.mark.parametrize("synced", [False, True])
def test_each_rank_resumes_its_own_sums_and_refuses_those_of_another(ranks: RankPool, kind: Kind, synced: bool) -> None:
    batches = [batches_of_rank(kind, rank) for rank in range(ranks.world_size)]
    saved = ranks.run(save_on_each_rank, kind, synced)
    states = [state for state, _ in saved]
    for rank, (found, count, message) in enumerate(ranks.run(load_on_each_rank, kind, states)):
        assert repr(found) == repr(saved[rank][1])
        assert_close(found, kind.expected(*batches))
        assert count == len(batches[rank])
        assert "each rank's own" in message
        assert f"'rank': {(rank + 1) % len(states)}" in message
    # One process is no rank of two.
    with pytest.raises(RuntimeError, match=f"'ranks': {ranks.world_size}"):
        persistent(kind).load_state_dict(states[0])


def save_in_a_group(rank: int, kind: Kind, members: list[int]) -> State:
    """What a rank of the group saves, or a rank outside of it nothing."""
    group = dist.new_group(members)
    if rank not in members:
        return {}
    metric = fed(kind.make(process_group=group), batches_of_rank(kind, rank))
    metric.persistent(True)
    return metric.state_dict()


def load_in_a_group(rank: int, kind: Kind, members: list[int], state: State) -> tuple[int, str]:
    """The updates that a rank of the group has after a load, and what the load raises."""
    group = dist.new_group(members)
    if rank not in members:
        return -1, ""
    metric, message = kind.make(process_group=group), ""
    metric.persistent(True)
    try:
        metric.load_state_dict(state)
    except RuntimeError as error:
        message = str(error)
    return metric.update_count, message


@of_every_kind
def test_sums_of_a_group_are_those_of_the_rank_within_it(three_ranks: RankPool, kind: Kind) -> None:
    """A group of other processes, of the same size, may resume it: the ranks of all processes are not looked at."""
    _, first, last = three_ranks.run(save_in_a_group, kind, [1, 2])
    for state, own, other in ((first, 0, 1), (last, 1, 0)):
        for members in ([1, 2], [0, 1]):
            answers = [three_ranks.run(load_in_a_group, kind, members, state)[member] for member in members]
            count, message = answers[own]
            assert (count, message) == (state["totals"][0, -1, 0].item(), "")
            count, message = answers[other]
            assert count == 0
            assert f"got the sums of {{'rank': {own}, 'ranks': 2}}" in message
            assert f"here is {{'rank': {other}, 'ranks': 2}}" in message


def load_sums_of_another_rank(rank: int, kind: Kind, state: State) -> int:
    metric = fed(persistent(kind), kind.batches(2))
    metric.load_state_dict(state)
    return metric.update_count


@of_every_kind
def test_a_checkpoint_that_is_written_after_a_reset_suits_every_rank(two_ranks: RankPool, kind: Kind) -> None:
    metric = fed(persistent(kind), kind.batches(2))
    metric.reset()
    assert two_ranks.run(load_sums_of_another_rank, kind, metric.state_dict()) == [0, 0]


def through_a_distributed_checkpoint(rank: int, kind: Kind, directory: str) -> bool:
    """It keeps one tensor a name, so each rank's sums go under a name of its own."""
    metric, fresh = fed(persistent(kind), batches_of_rank(kind, rank)), persistent(kind)
    state = {f"rank{rank}": fresh.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({f"rank{rank}": metric.state_dict()}, checkpoint_id=directory)
        load(state, checkpoint_id=directory)
    fresh.load_state_dict(state[f"rank{rank}"])
    return torch.equal(fresh.totals, metric.totals)


@of_every_kind
def test_a_distributed_checkpoint_keeps_each_ranks_sums(two_ranks: RankPool, kind: Kind, tmp_path: Path) -> None:
    assert two_ranks.run(through_a_distributed_checkpoint, kind, str(tmp_path)) == [True, True]
