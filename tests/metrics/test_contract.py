"""What every metric promises of its results: they are the oracle's, whatever the batches, and harm no sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.metrics import Ask, Kind, either_way, expect_result_of, jointly, of_every_kind
from tests.support.results import assert_close, fed, numbers


@of_every_kind
@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 6)), min_size=1, max_size=8))
def test_the_result_is_the_oracles_of_any_batches(kind: Kind, seeds_and_rows: list[tuple[int, int]]) -> None:
    batches = [kind.batch(seed, rows) for seed, rows in seeds_and_rows]
    metric = fed(kind.make(), batches)
    expect_result_of(kind, metric, batches)
    assert_close(numbers(jointly(metric)), kind.expected(batches))
    assert (metric.update_count, metric.update_called) == (len(batches), True)


@of_every_kind
def test_after_every_update_the_result_is_of_all_until_then(kind: Kind) -> None:
    """Nothing is cached."""
    metric, batches = kind.make(), kind.batches(6)
    for step, batch in enumerate(batches, start=1):
        metric.update(*batch)
        expect_result_of(kind, metric, batches[:step])
        assert metric.update_count == step


@of_every_kind
def test_forward_returns_the_batch_and_keeps_the_sums(kind: Kind) -> None:
    metric, batches = kind.make(), kind.batches(5)
    for batch in batches:
        assert_close(numbers(metric(*batch)), kind.expected([batch]))
    expect_result_of(kind, metric, batches)
    assert metric.update_count == len(batches)


@of_every_kind
def test_results_are_detached_float64_in_the_order_of_the_keys(kind: Kind) -> None:
    metric = kind.make()
    batch = tuple(part.requires_grad_() for part in kind.batch(3))
    for result in (metric(*batch), metric.compute(), jointly(metric)):
        assert list(result) == metric.keys() == list(kind.expected([kind.batch(3)]))
        for value in result.values():
            assert (value.shape, value.dtype) == ((), torch.float64)
            assert not value.requires_grad
    assert not metric.totals.requires_grad


@of_every_kind
def test_results_share_no_memory_with_the_sums_nor_each_other(kind: Kind) -> None:
    metric, batches = kind.make(), kind.batches(2)
    for result in (metric(*batches[0]), metric(*batches[1]), metric.compute(), jointly(metric)):
        for value in result.values():
            value.zero_()
    expect_result_of(kind, metric, batches)


@of_every_kind
def test_an_update_leaves_its_arguments_alone(kind: Kind) -> None:
    batch = kind.batch(2)
    before = [(part.clone(), part._version) for part in batch]
    fed(kind.make(), [batch]).compute()
    for part, (values, version) in zip(batch, before):
        assert torch.equal(part, values)
        assert part._version == version


@of_every_kind
@either_way
def test_before_any_update_there_is_no_data_and_compute_says_so(kind: Kind, ask: Ask) -> None:
    metric = kind.make()
    assert (metric.update_count, metric.update_called) == (0, False)
    with pytest.warns(UserWarning, match=rf"{kind.of.__name__}.compute\(\) was called before update"):
        found = numbers(ask(metric))
    assert_close(found, kind.expected([]))
    assert all(value == 0.0 if "weight" in key else math.isnan(value) for key, value in found.items())


@of_every_kind
def test_updates_without_rows_are_updates_but_no_data(kind: Kind) -> None:
    metric = fed(kind.make(), [kind.batch(0, rows=0)] * 3)
    assert (metric.update_count, metric.update_called) == (3, True)
    expect_result_of(kind, metric, [])


@of_every_kind
def test_updates_that_are_not_finite_are_updates_but_no_data(kind: Kind) -> None:
    nothing_finite = tuple(torch.full_like(part, math.nan) for part in kind.batch(3))
    metric = fed(kind.make(nan_strategy="ignore"), [nothing_finite] * 2)
    assert (metric.update_count, metric.update_called) == (2, True)
    expect_result_of(kind, metric, [])


@of_every_kind
def test_reset_starts_anew(kind: Kind) -> None:
    batches = kind.batches(5)
    metric = fed(kind.make(), batches[:3])
    metric.reset()
    assert (metric.update_count, metric.update_called) == (0, False)
    assert not metric.totals.any()
    expect_result_of(kind, fed(metric, batches[3:]), batches[3:])


# What is not finite, in one update of the last task.

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@of_every_kind
@BAD
@either_way
def test_what_is_not_finite_is_left_out_counted_and_named(kind: Kind, bad: float, ask: Ask) -> None:
    first, last, good = kind.batch(1), kind.batch(2), kind.batch(3)
    for part in range(len(good)):
        given, left_out = kind.changed(good, part, bad), kind.without_last_task(good)
        clean = kind.expected([first, left_out, left_out, last])
        metric = fed(kind.make(), [first, given, given, last])
        for _ in range(2):
            with pytest.warns(UserWarning, match=rf"{kind.of.__name__}: .* not finite: {kind.names()[-1]}: 2$"):
                assert_close(numbers(ask(metric)), clean)
        assert metric.update_count == 4
        metric.reset()
        expect_result_of(kind, fed(metric, [last]), [last])


@of_every_kind
@BAD
def test_with_ignore_it_is_left_out_silently(kind: Kind, bad: float) -> None:
    batches = kind.batches(3)
    for part in range(len(batches[0])):
        metric = fed(kind.make(nan_strategy="ignore"), [*batches, kind.changed(batches[0], part, bad)])
        expect_result_of(kind, metric, [*batches, kind.without_last_task(batches[0])])


@of_every_kind
@BAD
@either_way
def test_with_error_compute_raises_until_the_reset_and_no_sums_are_lost(kind: Kind, bad: float, ask: Ask) -> None:
    batches = kind.batches(3)
    for part in range(len(batches[0])):
        metric = fed(kind.make(nan_strategy="error"), [batches[0], kind.changed(batches[1], part, bad)])
        before = metric.totals.clone()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"{kind.of.__name__}: .* not finite: {kind.names()[-1]}: 1$"):
                ask(metric)
        assert torch.equal(metric.totals, before)
        metric.reset()
        expect_result_of(kind, fed(metric, batches), batches)


@of_every_kind
@BAD
def test_with_disable_it_is_let_in_to_its_own_task_alone(kind: Kind, bad: float) -> None:
    """A mean over an infinite weight is 0."""
    batches = kind.batches(3)
    clean = kind.expected([*batches, batches[0]])
    others = [key for key in clean if kind.tasks and key.endswith(kind.tasks[:-1])]
    own = next(key for key in clean if kind.tasks is None or key.endswith(kind.tasks[-1]))
    for part in range(len(batches[0])):
        metric = fed(kind.make(nan_strategy="disable"), [*batches, kind.changed(batches[0], part, bad)])
        found = numbers(metric.compute())
        assert_close({key: found[key] for key in others}, {key: clean[key] for key in others})
        assert math.isnan(found[own]) or found[own] in (0.0, math.inf, -math.inf)
