"""What every metric promises of checkpoints: its sums travel whole, to the ranks that they are of, or not at all."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.metrics import KEY, Kind, expect_result_of, of_every_kind, persistent
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, RankingQuality

State = dict[str, Any]


def through_a_file(state: State) -> State:
    """As a checkpoint goes, and as torch.load reads it by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


@of_every_kind
def test_a_resumed_metric_goes_on_as_one_that_never_stopped(kind: Kind) -> None:
    batches = kind.batches(6)
    stopped = fed(persistent(kind), batches[:3])
    resumed = fed(persistent(kind), batches[4:])
    resumed.load_state_dict(through_a_file(stopped.state_dict()))
    expect_result_of(kind, resumed, batches[:3])
    assert repr(numbers(resumed.compute())) == repr(numbers(stopped.compute()))
    assert resumed.update_count == 3
    for step in range(3, 6):
        fed(resumed, batches[step : step + 1])
        expect_result_of(kind, resumed, batches[: step + 1])
    assert resumed.update_count == 6
    again = persistent(kind)
    again.load_state_dict(through_a_file(resumed.state_dict()))
    expect_result_of(kind, again, batches)
    expect_result_of(kind, stopped, batches[:3])
    again.reset()
    assert again.update_count == 0
    expect_result_of(kind, fed(again, batches[2:]), batches[2:])


@of_every_kind
def test_only_a_persistent_metric_is_saved_and_in_one_entry(kind: Kind) -> None:
    metric = fed(kind.make(), kind.batches(2))
    assert metric.state_dict() == {}
    metric.persistent(True)
    metric.persistent(True)
    state = metric.state_dict(prefix="metric.")
    assert list(state) == [f"metric.{KEY}"]
    assert (state[f"metric.{KEY}"].dtype, state[f"metric.{KEY}"].ndim) == (torch.uint8, 1)
    metric.persistent(False)
    metric.persistent()
    assert metric.state_dict() == {}
    assert list(metric.children()) == []
    with pytest.raises(RuntimeError, match="Unexpected key"):
        metric.load_state_dict({KEY: state[f"metric.{KEY}"]})
    metric.load_state_dict({KEY: state[f"metric.{KEY}"]}, strict=False)
    expect_result_of(kind, metric, kind.batches(2))


@of_every_kind
def test_the_length_of_an_entry_does_not_depend_on_what_is_in_it(kind: Kind) -> None:
    """A distributed checkpoint refuses one of another length."""
    lengths = {len(fed(persistent(kind), kind.batches(count)).state_dict()[KEY]) for count in (0, 1, 12)}
    assert len(lengths) == 1


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
def test_a_cast_of_a_checkpoint_rounds_nothing(kind: Kind) -> None:
    """As people do with the floating tensors of one, to make it smaller."""
    batches = kind.batches(3)
    state = fed(persistent(kind), batches).state_dict()
    smaller = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    fresh = persistent(kind)
    fresh.load_state_dict(smaller)
    expect_result_of(kind, fresh, batches)


@of_every_kind
def test_a_load_brings_a_metric_from_the_meta_device(kind: Kind) -> None:
    state = fed(persistent(kind), kind.batches(2)).state_dict()
    with torch.device("meta"):
        metric = persistent(kind)
    empty = persistent(kind)
    empty.load_state_dict(metric.state_dict())
    assert empty.update_count == 0
    metric.load_state_dict(state, assign=True)
    expect_result_of(kind, fed(metric, kind.batches(2, seed=2)), kind.batches(4))


@of_every_kind
def test_a_load_between_sync_and_unsync_is_refused(kind: Kind) -> None:
    """unsync() would drop what is loaded."""
    batches = kind.batches(3)
    metric = fed(persistent(kind), batches[:2])
    metric.distributed_available_fn = lambda: True
    metric.sync()
    with pytest.raises(RuntimeError, match=r"sums\._extra_state: got .* between sync\(\) and unsync\(\)"):
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
        with pytest.raises(RuntimeError, match=r"sums\._extra_state: got .* expected "):
            metric.load_state_dict(state)
        assert metric.update_count == 3, name
        expect_result_of(kind, metric, batches)


HEAD = 4 * 8  # the checksum of what follows it, the number of sums, the rank and the number of ranks


def as_tensor(entry: bytes) -> Tensor:
    return torch.tensor(list(entry), dtype=torch.uint8)


def parts_of(entry: Tensor) -> tuple[list[int], list[float], bytes]:
    """The head of an entry, its sums and its text."""
    found = bytes(entry.tolist())
    head = struct.unpack("<4q", found[:HEAD])
    end = HEAD + 8 * head[1]
    return [*head], [*struct.unpack(f"<{head[1]}d", found[HEAD:end])], found[end:]


def sealed(head: list[int], sums: list[float], text: bytes) -> Tensor:
    """An entry of these parts, with the checksum that it has to have."""
    rest = struct.pack("<3q", *head[1:]) + struct.pack(f"<{len(sums)}d", *sums) + text
    return as_tensor(struct.pack("<q", zlib.crc32(rest)) + rest)


def with_text(entry: Tensor, change: Callable[[dict[str, Any]], object]) -> Tensor:
    """An entry that was saved with another text after its numbers."""
    head, sums, text = parts_of(entry)
    changed = change(json.loads(text))
    return sealed(head, sums, changed if isinstance(changed, bytes) else json.dumps(changed).encode())


def with_sum(entry: Tensor, value: float) -> Tensor:
    """An entry that was saved with another first sum."""
    head, sums, text = parts_of(entry)
    return sealed(head, [value, *sums[1:]], text)


def with_number(entry: Tensor, place: int, value: int) -> Tensor:
    """An entry with another number in its head, which was changed afterwards."""
    changed = entry.clone()
    changed[:HEAD].view(torch.int64)[place] = value
    return changed


DAMAGED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "no tensor": (lambda entry: entry.tolist(), "list"),
    "dtype": (lambda entry: entry.float(), "float32"),
    "shape": (lambda entry: entry.unsqueeze(0), "shape"),
    "meta": (lambda entry: entry.to("meta"), "meta"),
    "nothing": (lambda entry: entry[:0], "damaged"),
    "half a head": (lambda entry: entry[:20], "damaged"),
    "half": (lambda entry: entry[: len(entry) // 2], "damaged"),
    "no text": (lambda entry: entry[: HEAD + 8 * len(parts_of(entry)[1])], "damaged"),
    "half a text": (lambda entry: entry[:-5], "damaged"),
    "more": (lambda entry: torch.cat((entry, entry)), "damaged"),
    "something else": (lambda _: torch.get_rng_state(), "damaged"),
    "zeros": (torch.zeros_like, "damaged"),
    "another text": (lambda entry: with_text(entry, lambda _: [1]), "expected a JSON object"),
    "no JSON": (lambda entry: with_text(entry, lambda _: b"\xff\xfe"), "text"),
    "deep nesting": (lambda entry: with_text(entry, lambda _: b"[" * 100_000), "text"),
    "a text without names": (lambda entry: with_text(entry, lambda _: {}), "no class"),
    "another shape": (lambda entry: with_text(entry, lambda text: {**text, "shape": [1, 2]}), "shape"),
    "a checksum": (lambda entry: with_number(entry, 0, 0), "damaged"),
    "a count": (lambda entry: with_number(entry, 1, 10**9), "damaged"),
    "a negative count": (lambda entry: with_number(entry, 1, -1), "damaged"),
    "a rank": (lambda entry: with_number(entry, 2, 1), "damaged"),
    "ranks": (lambda entry: with_number(entry, 3, 2), "damaged"),
    "sums of NaN": (lambda entry: with_sum(entry, math.nan), "not finite"),
    "infinite sums": (lambda entry: with_sum(entry, -math.inf), "not finite"),
}


@of_every_kind
@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_entry_is_one_clear_error_and_changes_nothing(
    kind: Kind, damage: Callable[[Tensor], Any], message: str
) -> None:
    metric = fed(persistent(kind), kind.batches(3))
    entry = fed(persistent(kind), kind.batches(1)).state_dict()[KEY]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"sums\._extra_state: got .*({message})"):
            metric.load_state_dict({KEY: damage(entry)}, strict=strict)
    expect_result_of(kind, metric, kind.batches(3))


@of_every_kind
@pytest.mark.parametrize("count", [-2.0, 0.5])
def test_a_count_that_no_updates_give_is_damage_whatever_it_counts(kind: Kind, count: float) -> None:
    """The finite updates, the rows in a window of rows, or all updates; since reset() or in a window."""
    metric = fed(persistent(kind), kind.batches(3))
    _, horizons, rows, _ = metric.totals.shape
    sums = 2 if kind.of is GlobalLoss else 4
    for horizon, counter in product((0, horizons - 1), range(sums, rows)):
        spoilt = fed(persistent(kind), kind.batches(1))
        spoilt.totals[0, horizon, counter, -1] = count
        with pytest.raises(RuntimeError, match=r"sums\._extra_state: got .*damaged"):
            metric.load_state_dict(spoilt.state_dict())
    expect_result_of(kind, metric, kind.batches(3))


@pytest.mark.parametrize("kind", [Kind(GlobalLoss), Kind(RankingQuality, window=2)], ids=["losses", "a window"])
def test_any_bit_that_is_wrong_is_an_error(kind: Kind) -> None:
    """Each in turn; a damaged description too is called what it is, and not sums of something else."""
    entry = fed(persistent(kind), kind.batches(2)).state_dict()[KEY]
    metric = fed(persistent(kind), kind.batches(3))
    for place in range(len(entry)):
        for bit in range(8):
            changed = entry.clone()
            changed[place] ^= 1 << bit
            with pytest.raises(RuntimeError, match=rf"sums\._extra_state: got {len(entry)} bytes that are damaged"):
                metric.load_state_dict({KEY: changed})
    expect_result_of(kind, metric, kind.batches(3))
    metric.load_state_dict({KEY: entry})
    expect_result_of(kind, metric, kind.batches(2))


@of_every_kind
def test_an_entry_is_laid_out_as_its_format_says(kind: Kind) -> None:
    metric = fed(persistent(kind), kind.batches(2))
    entry = metric.state_dict()[KEY]
    head, sums, text = parts_of(entry)
    assert torch.equal(sealed(head, sums, text), entry)
    assert head[1:] == [len(sums), 0, 1]
    assert sorted(sums) == sorted(metric.totals.sum(0).flatten().tolist())  # a window's from old to new
    description = json.loads(text)
    assert description["class"] == kind.of.__name__
    assert description["tasks"] == (kind.tasks and list(kind.tasks))
    assert math.prod(description["shape"]) == len(sums)


def test_every_value_goes_through_to_the_last_bit() -> None:
    """NaN with its payload, and what has no other digits to lose."""
    numbers = [math.nan, math.inf, -math.inf, 5e-324, -1.7976931348623157e308, 1 / 3, 0.0]
    payload = torch.tensor([0x7FF8_0000_0000_0123])
    values = torch.cat((torch.tensor(numbers, dtype=torch.float64).view(torch.int64), payload))
    metric, again = (GlobalLoss([f"task {i}" for i in range(8)], nan_strategy="disable") for _ in range(2))
    metric.totals[0, 0, 0] = values.view(torch.float64)
    for each in (metric, again):
        each.persistent(True)
    again.load_state_dict(through_a_file(metric.state_dict()))
    saved = parts_of(again.state_dict()[KEY])
    assert torch.equal(again.totals[1, 0, 0].view(torch.int64), values)
    assert repr(saved) == repr(parts_of(metric.state_dict()[KEY]))


@of_every_kind
def test_a_missing_entry_is_torchs_missing_key(kind: Kind) -> None:
    """As for a parameter: an error, or with strict=False nothing."""
    metric = fed(persistent(kind), kind.batches(3))
    for state in ({}, {"totals": metric.totals, "sums_of": metric.sums_of}):
        with pytest.raises(RuntimeError, match=rf"Missing key.*{KEY}"):
            metric.load_state_dict(state)
        metric.load_state_dict(state, strict=False)
        expect_result_of(kind, metric, kind.batches(3))


@of_every_kind
def test_sums_that_are_not_finite_go_where_they_may_be(kind: Kind) -> None:
    metric = fed(persistent(kind, nan_strategy="disable"), [kind.changed(kind.batch(0), 0, math.nan)])
    state = metric.state_dict()
    with pytest.raises(RuntimeError, match="not finite"):
        persistent(kind).load_state_dict(state)
    again = persistent(kind, nan_strategy="disable")
    again.load_state_dict(state)
    assert repr(numbers(again.compute())) == repr(numbers(metric.compute()))


# On ranks.


def batches_of_rank(kind: Kind, rank: int) -> list[Any]:
    return kind.batches(2 + rank, seed=100 * rank)


def save_on_each_rank(rank: int, kind: Kind) -> State:
    return through_a_file(fed(persistent(kind), batches_of_rank(kind, rank)).state_dict())


def load_on_each_rank(rank: int, kind: Kind, states: list[State]) -> tuple[bool, dict[str, float], int, str]:
    """Whether a rank's own state brings its sums to the last bit; the result, its updates, what another's raises."""
    metric, message = persistent(kind), ""
    metric.load_state_dict(states[rank])
    try:
        metric.load_state_dict(states[(rank + 1) % len(states)])
    except RuntimeError as error:
        message = str(error)
    same = torch.equal(metric.totals[0, 0], fed(kind.make(), batches_of_rank(kind, rank)).totals[0, 0])
    return same, numbers(metric.compute()), metric.update_count, message


@of_every_kind
def test_each_rank_resumes_its_own_sums_and_refuses_those_of_another(ranks: RankPool, kind: Kind) -> None:
    batches = [batches_of_rank(kind, rank) for rank in range(ranks.world_size)]
    states = ranks.run(save_on_each_rank, kind)
    for rank, (same, found, count, message) in enumerate(ranks.run(load_on_each_rank, kind, states)):
        assert same
        assert_close(found, kind.expected(*batches))
        assert count == len(batches[rank])
        assert KEY in message
        assert f"got the sums of rank {(rank + 1) % len(states)} of {len(states)} alone" in message
        assert f"expected those of rank {rank} of {len(states)}" in message
        assert "global_sums" in message
        assert "leave this key out" in message
    # One process is no rank of two.
    metric = persistent(kind)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"rank 0 of {len(states)} alone, .*global_sums"):
            metric.load_state_dict(states[0], strict=strict)
    assert metric.update_count == 0


def save_in_a_group(rank: int, kind: Kind, members: list[int]) -> State:
    """What a rank saves, in the group or outside of it."""
    metric = fed(persistent(kind, process_group=dist.new_group(members)), batches_of_rank(kind, rank))
    return metric.state_dict()


def load_in_a_group(rank: int, kind: Kind, members: list[int], state: State) -> tuple[int, str]:
    """The updates that a rank has after a load, and what the load raises."""
    metric, message = persistent(kind, process_group=dist.new_group(members)), ""
    try:
        metric.load_state_dict(state)
    except RuntimeError as error:
        message = str(error)
    return metric.update_count, message


@of_every_kind
def test_sums_of_a_group_are_those_of_the_rank_within_it(three_ranks: RankPool, kind: Kind) -> None:
    """A group of other processes, of the same size, may resume it: the ranks of all processes are not looked at."""
    outside, first, last = three_ranks.run(save_in_a_group, kind, [1, 2])
    for state, own, other, updates in ((first, 0, 1, 3), (last, 1, 0, 4)):
        for members in ([1, 2], [0, 1]):
            answers = three_ranks.run(load_in_a_group, kind, members, state)
            assert answers[members[own]] == (updates, "")
            count, message = answers[members[other]]
            assert count == 0
            assert f"got the sums of rank {own} of 2 alone, expected those of rank {other} of 2" in message
    # What a rank outside of the group has is no part of the group's sums.
    answers = three_ranks.run(load_in_a_group, kind, [1, 2], outside)
    assert answers[0] == (2, "")
    assert [count for count, _ in answers[1:]] == [0, 0]


def load_sums_of_another_rank(rank: int, kind: Kind, state: State) -> int:
    metric = fed(persistent(kind), kind.batches(2))
    metric.load_state_dict(state)
    return metric.update_count


def save_after_a_reset(rank: int, kind: Kind) -> State:
    metric = fed(persistent(kind), kind.batches(2))
    metric.reset()
    return metric.state_dict()


@of_every_kind
def test_a_checkpoint_that_is_written_after_a_reset_suits_every_rank(
    two_ranks: RankPool, three_ranks: RankPool, kind: Kind
) -> None:
    for state in (*two_ranks.run(save_after_a_reset, kind), save_after_a_reset(0, kind)):
        assert two_ranks.run(load_sums_of_another_rank, kind, state) == [0, 0]
        assert three_ranks.run(load_sums_of_another_rank, kind, state) == [0, 0, 0]
        assert load_sums_of_another_rank(0, kind, state) == 0
