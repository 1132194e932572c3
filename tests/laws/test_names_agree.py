"""Ranks whose tasks have other names, or another order, are told so: no sum is ever of two tasks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counts import CollectiveLog
from tests.support import reference
from tests.support.metrics import Kind, Summing, numbers_of_this_rank
from tests.support.rank_pool import RankPool
from tests.support.refusals import error_of
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality, compute_all, get_global_loss_detached

Names = tuple[str, ...]

ONE_COLLECTIVE = ["c10d.allreduce_.default"]
# What the first rank calls its tasks, and what the last one does.
DIFFERENT: dict[str, tuple[Names, Names]] = {
    "another order": (("like", "reply", "share"), ("share", "reply", "like")),
    "two swapped": (("like", "reply", "share"), ("like", "share", "reply")),
    "another name": (("like", "reply", "share"), ("like", "reply", "retweet")),
    "other cuts of one text": (("ab", "c"), ("a", "bc")),
    "one task": (("like",), ("reply",)),
    "another case": (("like", "reply"), ("Like", "reply")),
}
different = pytest.mark.parametrize("names", DIFFERENT.values(), ids=DIFFERENT)


def names_of(rank: int, names: tuple[Names, Names]) -> Names:
    """All ranks but the last have the first names."""
    return names[rank == torch.distributed.get_world_size() - 1]


def expect_named(answers: Sequence[str], names: tuple[Names, Names]) -> None:
    """Every rank has an error with the names that it has itself."""
    for rank, text in enumerate(answers):
        own = names[rank == len(answers) - 1]
        assert all(repr(name) in text or f'"{name}"' in text for name in own), (rank, text)


# In forward.


def batch_of(rank: int, tasks: int, rows: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rows = 3 + 2 * rank if rows is None else rows
    logits, labels = torch.rand(2, rows, tasks, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), labels


def forward_of_different_names(rank: int, names: tuple[Names, Names], rows: int | None) -> tuple[str, int]:
    own = names_of(rank, names)
    loss = MultiTaskLoss("bce_with_logits", own, global_batch=True)
    text = error_of(lambda: loss(*batch_of(rank, len(own), rows)))
    return text, loss.train_metric.update_count


@different
def test_forward_raises_on_every_rank_and_counts_nothing(ranks: RankPool, names: tuple[Names, Names]) -> None:
    answers = ranks.run(forward_of_different_names, names, None)
    expect_named([text for text, _ in answers], names)
    assert [count for _, count in answers] == [0] * ranks.world_size


def test_forward_raises_where_no_rank_has_a_row(two_ranks: RankPool) -> None:
    names = DIFFERENT["another order"]
    expect_named([text for text, _ in two_ranks.run(forward_of_different_names, names, 0)], names)


def compiled_forward_of_different_names(rank: int, names: tuple[Names, Names]) -> str:
    own = names_of(rank, names)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = MultiTaskLoss("bce_with_logits", own, global_batch=True)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        text = error_of(lambda: compiled(*batch_of(rank, len(own))))
    torch._dynamo.reset()
    return text


def test_a_compiled_forward_raises_on_every_rank(two_ranks: RankPool) -> None:
    names = DIFFERENT["another order"]
    expect_named(two_ranks.run(compiled_forward_of_different_names, names), names)


# In compute() and what else is of all ranks.

METRICS = {
    "losses": Kind(GlobalLoss),
    "qualities": Kind(RankingQuality),
    "qualities with a window": Kind(RankingQuality, window=2),
}


def of_all_ranks(how: str, metric: Summing) -> object:
    if how == "compute":
        return metric.compute()
    if how == "compute_all":
        return compute_all(metric, reset=True)
    if how == "sync":
        return metric.sync()
    if how == "view":
        return metric.scalar(metric.keys()[0]).compute()
    with metric.sync_context():
        return metric.compute()


def sums_of_different_names(rank: int, kind: Kind, how: str, names: tuple[Names, Names], without: int) -> Any:
    """The error, and whether the metric is afterwards what it was."""
    own = Kind(kind.of, names_of(rank, names), kind.window)
    batches = [] if rank == without else own.batches(3, seed=100 * rank)
    metric = fed(own.make(), batches)
    before = metric.totals.clone()
    text = error_of(lambda: of_all_ranks(how, metric))
    kept = torch.equal(metric.totals, before) and metric.update_count == len(batches) and not metric._is_synced
    if text:
        batches += own.batches(1, seed=7)
        fed(metric, batches[-1:])
        assert_close(numbers_of_this_rank(metric), own.expected(batches))
    return text, kept


@pytest.mark.parametrize("how", ["compute", "compute_all", "sync", "sync_context", "view"])
@pytest.mark.parametrize("kind", METRICS.values(), ids=METRICS)
def test_what_is_of_all_ranks_raises_on_every_rank_and_leaves_the_local_sums(
    ranks: RankPool, kind: Kind, how: str
) -> None:
    names = DIFFERENT["another order"]
    answers = ranks.run(sums_of_different_names, kind, how, names, -1)
    expect_named([text for text, _ in answers], names)
    assert all(kept for _, kept in answers)


@different
@pytest.mark.parametrize("how", ["compute", "compute_all"])
@pytest.mark.parametrize("kind", METRICS.values(), ids=METRICS)
def test_compute_tells_any_names_apart(two_ranks: RankPool, kind: Kind, how: str, names: tuple[Names, Names]) -> None:
    answers = two_ranks.run(sums_of_different_names, kind, how, names, -1)
    expect_named([text for text, _ in answers], names)
    assert all(kept for _, kept in answers)


@pytest.mark.parametrize("without", [0, 1])
def test_a_rank_without_an_update_has_names_too(two_ranks: RankPool, without: int) -> None:
    names = DIFFERENT["two swapped"]
    answers = two_ranks.run(sums_of_different_names, METRICS["losses"], "compute", names, without)
    expect_named([text for text, _ in answers], names)


def losses_of_different_names(rank: int, names: tuple[Names, Names]) -> tuple[str, str]:
    """Of a loss whose forward is of this rank's rows alone, the first that all ranks do together is compute()."""
    own = names_of(rank, names)
    loss = MultiTaskLoss("bce_with_logits", own)
    loss(*batch_of(rank, len(own)))
    return error_of(copy.deepcopy(loss).train_metric.compute), error_of(copy.deepcopy(loss).compute)


def test_the_metric_of_a_loss_raises_too(ranks: RankPool) -> None:
    names = DIFFERENT["another order"]
    for answers in zip(*ranks.run(losses_of_different_names, names)):
        expect_named(answers, names)


# Segments.

# What the first rank tells rows apart by, and what the last one does, in as many cells.
OTHER_SEGMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other names": ({"a": ["x", "y"]}, {"a": ["x", "z"]}),
    "another order of names": ({"a": ["x", "y"]}, {"a": ["y", "x"]}),
    "another dimension": ({"a": 2}, {"b": 2}),
    "another order of dimensions": ({"a": 2, "b": 1}, {"b": 1, "a": 2}),
    "names in place of a number": ({"a": 2}, {"a": ["x", "y"]}),
    "other cuts": ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
}


def losses_of_other_segments(rank: int, both: tuple[dict[str, Any], dict[str, Any]]) -> list[tuple[str, bool]]:
    """What each call for all ranks says, and whether the sums are then what they were; forward has no cells."""
    segments = both[rank == torch.distributed.get_world_size() - 1]
    loss = MultiTaskLoss("bce_with_logits", ["like"], segments=segments, quality=True, global_batch=True)
    logits, labels = batch_of(rank, 1)
    loss(logits, labels, segments={name: torch.arange(len(labels)) for name in segments})
    found = []
    for call in (loss.train_metric.compute, loss.train_quality.compute, loss.compute, lambda: compute_all(loss)):
        before = [metric.totals.clone() for metric in (loss.train_metric, loss.train_quality)]
        text = error_of(call)
        after = [metric.totals for metric in (loss.train_metric, loss.train_quality)]
        found.append((text, all(map(torch.equal, before, after))))
    return found


@pytest.mark.parametrize("both", OTHER_SEGMENTS.values(), ids=OTHER_SEGMENTS)
def test_other_segments_raise_on_every_rank(ranks: RankPool, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    answers = ranks.run(losses_of_other_segments, both)
    for rank, answer in enumerate(answers):
        own = reference.cells_of(both[rank == len(answers) - 1])
        for text, kept in answer:
            assert kept
            assert all(cell in text for cell in own), text


# Names that agree.

AGREEING: dict[str, Names] = {
    "three": ("like", "reply", "share"),
    "one": ("like",),
    "of every kind": ("naïve", "点赞", "with space", "a/b", "0", "👍"),
    "many": tuple(f"task {index}" for index in range(300)),
}


def losses_of_one_name(rank: int, names: Names) -> tuple[list[list[str]], list[dict[str, float]]]:
    loss = MultiTaskLoss("bce_with_logits", list(names), global_batch=True)
    logs = [CollectiveLog() for _ in range(3)]
    with logs[0]:
        losses = loss(*batch_of(rank, len(names)))
    with logs[1]:
        losses["loss"].backward()
    with logs[2]:
        computed = loss.train_metric.compute()
    return [log.names for log in logs], [numbers(losses), numbers(computed)]


@pytest.mark.parametrize("names", AGREEING.values(), ids=AGREEING)
def test_names_that_agree_cost_no_collective_and_change_no_number(ranks: RankPool, names: Names) -> None:
    columns: dict[str, list[reference.Row]] = {name: [] for name in names}
    for rank in range(ranks.world_size):
        logits, labels = batch_of(rank, len(names))
        for name, xs, ys in zip(names, logits.T.tolist(), labels.T.tolist()):
            columns[name] += [reference.Row(reference.bce_with_logits(x, y)) for x, y in zip(xs, ys)]
    truth = reference.losses(columns, reference.Rule())
    for collectives, results in ranks.run(losses_of_one_name, names):
        assert collectives == [ONE_COLLECTIVE, [], ONE_COLLECTIVE]
        for result in results:
            assert result == pytest.approx(truth, rel=1e-12)


# A mapping of losses.


def mapping_of(rank: int, keys: tuple[Names, Names], weighted: bool) -> tuple[str, dict[str, float]]:
    own = names_of(rank, keys)
    losses = {key: torch.tensor(float(len(key)) + rank, dtype=torch.float64) for key in own}
    result: dict[str, float] = {}

    def reduce() -> None:
        result.update(numbers(get_global_loss_detached(losses, weight=rank + 1.0 if weighted else None)))

    text = error_of(reduce)
    assert [value.item() for value in losses.values()] == [len(key) + rank for key in own]
    return text, result


OTHER_KEYS = {name: names for name, names in DIFFERENT.items() if set(names[0]) != set(names[1])}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("keys", OTHER_KEYS.values(), ids=OTHER_KEYS)
def test_a_mapping_with_other_keys_raises_on_every_rank(
    ranks: RankPool, keys: tuple[Names, Names], weighted: bool
) -> None:
    answers = ranks.run(mapping_of, keys, weighted)
    expect_named([text for text, _ in answers], keys)
    assert [result for _, result in answers] == [{}] * ranks.world_size


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_a_mapping_in_another_order_is_reduced_by_key(ranks: RankPool, weighted: bool) -> None:
    keys = DIFFERENT["another order"]
    weights = [rank + 1.0 if weighted else 1.0 for rank in range(ranks.world_size)]
    mean = sum(rank * weight for rank, weight in enumerate(weights)) / sum(weights)
    answers = ranks.run(mapping_of, keys, weighted)
    for rank, (text, result) in enumerate(answers):
        assert text == ""
        assert list(result) == list(keys[rank == ranks.world_size - 1])
        assert result == pytest.approx({key: len(key) + mean for key in keys[0]}, rel=1e-15)


def mapping_of_shapes(rank: int) -> str:
    """Two losses with as many values in all, whose shapes are those of the other rank's the other way round."""
    sizes = {"x": 1 + rank, "y": 2 - rank}
    return error_of(lambda: get_global_loss_detached({key: torch.ones(size) for key, size in sizes.items()}))


def test_a_mapping_of_other_shapes_raises_on_every_rank(two_ranks: RankPool) -> None:
    for text in two_ranks.run(mapping_of_shapes):
        assert "'x[" in text
        assert "expected the same" in text
