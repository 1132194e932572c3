"""``compute_all()`` over ranks: the oracle's numbers of all rows, by one collective for each process group there is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.counts import CollectiveLog
from tests.laws.test_payload import ProcessGroupLog, Sent
from tests.support import quality_reference, reference
from tests.support.cases import Ranker, Rows, Settings, joined, random_rows, split
from tests.support.cases import columns as rows_of_tasks
from tests.support.metrics import KEY, KINDS, Batch, Kind, persistent
from tests.support.rank_pool import RankPool
from tests.support.refusals import error_of
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality, TaskMetric, compute_all, compute_all_async, global_sums

Numbers = dict[str, float]
ByRank = list[list[Batch]]

ALL_REDUCE = "c10d.allreduce_.default"
LATER = [False, True]
"""Whether it is the call that returns at once."""


def ask(metrics: Any, is_async: bool, **options: Any) -> tuple[Numbers, list[str]]:
    """The results of a call, and its collectives."""
    with CollectiveLog() as log:
        found = compute_all_async(metrics, **options).wait() if is_async else compute_all(metrics, **options)
    return numbers(found), log.names


def batches_of(kind: Kind, counts: Sequence[int], seed: int = 0) -> ByRank:
    """The batches of each rank."""
    return [kind.batches(count, seed=seed + 100 * rank) for rank, count in enumerate(counts)]


def expected(by_name: Mapping[str, tuple[Kind, ByRank]]) -> Numbers:
    """The oracle's of all of them."""
    return {
        f"{name}/{key}": value
        for name, (kind, batches) in by_name.items()
        for key, value in kind.expected(*batches).items()
    }


def expect_on_every_rank(found: Sequence[Numbers], oracle: Numbers) -> None:
    """The oracle's result, to the last bit the same on all ranks."""
    for each in found:
        assert_close(each, oracle)
        assert repr(each) == repr(found[0])


# The numbers, and what they take.


def life_of(rank: int, by_name: Mapping[str, tuple[Kind, ByRank]], is_async: bool) -> dict[str, Any]:
    """All metrics at once, then each by itself; then with a reset, and after it."""
    metrics = {name: fed(kind.make(), batches[rank]) for name, (kind, batches) in by_name.items()}
    before = {name: metric.totals.clone() for name, metric in metrics.items()}
    together, collectives = ask(metrics, is_async)
    kept = all(torch.equal(metric.totals, before[name]) for name, metric in metrics.items())
    apart = {f"{name}/{key}": v for name, metric in metrics.items() for key, v in numbers(metric.compute()).items()}
    again, _ = ask(metrics, is_async, reset=True)
    counts = [metric.update_count for metric in metrics.values()]
    for name, (kind, batches) in by_name.items():
        fed(metrics[name], [kind.batch(900 + rank), *batches[rank]])
    after, _ = ask(metrics, is_async)
    return {"results": [together, again], "apart": apart, "kept": kept, "collectives": collectives} | {
        "counts": counts,
        "after": after,
    }


def expect_the_law(ranks: RankPool, by_name: Mapping[str, tuple[Kind, ByRank]], is_async: bool) -> None:
    answers = ranks.run(life_of, by_name, is_async)
    later = {
        name: (kind, [[kind.batch(900 + rank), *own] for rank, own in enumerate(batches)])
        for name, (kind, batches) in by_name.items()
    }
    for answer in answers:
        assert answer["collectives"] == [ALL_REDUCE]
        assert answer["kept"]
        assert answer["counts"] == [0] * len(by_name)
        assert_close(answer["apart"], answers[0]["results"][0])
    for which in range(2):
        expect_on_every_rank([answer["results"][which] for answer in answers], expected(by_name))
    expect_on_every_rank([answer["after"] for answer in answers], expected(later))


@pytest.mark.parametrize("is_async", LATER)
def test_metrics_of_all_kinds_by_one_collective(ranks: RankPool, is_async: bool) -> None:
    """Of some of which a rank, or all but one, have no rows."""
    counts = [[2, 1, 3], [0, 3, 1], [3, 0, 2], [1, 2, 0], [2, 2, 2], [0, 1, 0]]
    by_name = {
        name: (kind, batches_of(kind, own[: ranks.world_size], seed))
        for seed, ((name, kind), own) in enumerate(zip(KINDS.items(), counts))
    }
    expect_the_law(ranks, by_name, is_async)


@given(data=st.data())
def test_any_metrics_of_any_batches(two_ranks: RankPool, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4))
    some = st.tuples(st.integers(1, 3), st.integers(0, 3)).flatmap(st.permutations)
    by_name = {
        str(place): (KINDS[name], batches_of(KINDS[name], data.draw(some), seed=7 * place))
        for place, name in enumerate(names)
    }
    expect_the_law(two_ranks, by_name, data.draw(st.booleans()))


CASE = Settings(3)


class Model(nn.Module):
    """A model that trains, with a loss that tracks the quality, and the metrics of one more part."""

    def __init__(self) -> None:
        super().__init__()
        self.ranker = Ranker(MultiTaskLoss("bce_with_logits", CASE.names(), quality=True), CASE.tasks)
        self.parts = nn.ModuleList([GlobalLoss(None), nn.Identity()])

    def forward(self, rows: Rows) -> Tensor:
        """The loss."""
        loss: Tensor = self.ranker(rows)["loss"]
        return loss


def train(rank: int, steps: list[list[Rows]], is_compiled: bool) -> list[Any]:
    """What a model gives that is wrapped, in training and then in evaluation, and its loss by itself."""
    torch._dynamo.reset()
    model = Model()
    own: Any = torch.compile(model, backend="eager") if is_compiled else model
    wrapped, loss = DistributedDataParallel(own), model.ranker.loss
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for parts in steps:
            wrapped(parts[rank]).backward()
    del model.parts
    results.append(ask(wrapped, is_async=False))
    with CollectiveLog() as log:
        results.append((numbers(loss.compute()), log.names))
    pending = loss.compute_async()
    loss.reset()
    results.append((numbers(pending.wait()), [ALL_REDUCE]))
    assert (loss.train_metric.update_count, loss.train_quality.update_count) == (0, 0)
    wrapped.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parts in steps:
            wrapped(parts[rank])
    results.append(ask({"": nn.ModuleList([wrapped])}, is_async=False, reset=True))
    torch._dynamo.reset()
    return results


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_model_that_is_wrapped_and_its_loss(two_ranks: RankPool, is_compiled: bool) -> None:
    """What backward makes of the heads is in no running sum."""
    rows = random_rows(CASE, 23, 0, weighted=False)
    steps = split(rows, [[5, 2], [0, 7], [4, 5]])
    losses = rows_of_tasks(CASE, joined([part for parts in steps for part in parts]))
    oracle = reference.losses(losses, CASE.rule())
    for answers in two_ranks.run(train, steps, is_compiled):
        for (found, collectives), prefix in zip(answers, ["", "", "", "/"]):
            assert collectives == [ALL_REDUCE]
            own = {key.removeprefix(prefix): value for key, value in found.items()}
            assert {key: own[key] for key in oracle} == pytest.approx(oracle, rel=1e-12)
            assert [own[f"weight/{task}"] for task in CASE.names()] == [23.0] * CASE.tasks
            assert [own[f"logloss/{task}"] for task in CASE.names()] == pytest.approx(
                [oracle[f"loss/{task}"] for task in CASE.names()], rel=1e-12
            )
            assert len(own) == len(oracle) + len(quality_reference.QUANTITIES) * CASE.tasks


def tensors_sent(rank: int, names: list[str], rows: int, steps: int) -> list[Sent]:
    """By this rank, in one call for metrics of these kinds."""
    metrics = {name: fed(KINDS[name].make(), [KINDS[name].batch(rank, rows + rank)] * steps) for name in names}
    log = ProcessGroupLog()
    with log:
        compute_all(metrics)
    return log.sent


def test_what_is_sent_is_one_tensor_of_one_size_for_any_few_metrics(two_ranks: RankPool) -> None:
    """Of other sizes gloo would end the process where ranks ask for other metrics."""
    for names in (["losses"], ["losses", "qualities", "qualities with a window"]):
        for rows, steps in ((1, 1), (50, 3)):
            assert two_ranks.run(tensors_sent, names, rows, steps) == [[(ALL_REDUCE, torch.float64, (4096,))]] * 2


def compute_many(rank: int, tasks: int) -> tuple[list[Sent], float]:
    names = [f"task {index}" for index in range(tasks)]
    metric = fed(GlobalLoss(names, "sum", "sum"), [(torch.arange(tasks, dtype=torch.float64) * (rank + 1), 1)])
    with ProcessGroupLog() as log:
        return log.sent, compute_all({"a": metric, "b": metric_of("x")})["a/loss"].item()


@pytest.mark.parametrize(("tasks", "size"), [(583, 4096), (584, 4096), (585, 8192), (2000, 16384)])
def test_more_than_that_is_sent_by_one_collective_too(two_ranks: RankPool, tasks: int, size: int) -> None:
    """Seven rows of them, and of one more task, and the header fill 4,096 places at 584 tasks."""
    for sent, total in two_ranks.run(compute_many, tasks):
        assert sent == [(ALL_REDUCE, torch.float64, (size,))]
        assert total == 3 * sum(range(tasks))


# Process groups, and metrics that go their own ways.


def gather(values: Tensor, group: Any = None) -> list[Tensor]:
    """A sync function of one's own."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return parts


def mixed(rank: int, batches: ByRank, is_async: bool) -> list[Any]:
    """Metrics of every way, in one call, and with a reset."""
    twin, pair = dist.new_group(), dist.new_group([0, 1])
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "default": {"process_group": dist.group.WORLD},
        "twin": {"process_group": twin},
        "alone": {"sync_on_compute": False},
        "own": {"dist_sync_fn": gather},
        "off": {"distributed_available_fn": lambda: False},
        **({"pair": {"process_group": pair}} if rank < 2 else {}),
    }
    metrics = {name: fed(GlobalLoss(["a", "b", "c"], **each), batches[rank]) for name, each in options.items()}
    found = [ask(metrics, is_async), ask(metrics, is_async, reset=True)]
    return [found, [metric.update_count for metric in metrics.values()]]


@pytest.mark.parametrize("is_async", LATER)
def test_one_collective_for_each_group_and_none_for_what_is_not_sent(three_ranks: RankPool, is_async: bool) -> None:
    kind = Kind(GlobalLoss, ("a", "b", "c"))
    batches = batches_of(kind, [2, 3, 1])
    for rank, (calls, counts) in enumerate(three_ranks.run(mixed, batches, is_async)):
        alone, whole = [batches[rank]], batches
        of_ranks = {"none": whole, "default": whole, "twin": whole, "alone": alone, "own": whole, "off": alone}
        if rank < 2:
            of_ranks["pair"] = batches[:2]
        for found, collectives in calls:
            assert_close(found, expected({name: (kind, ranks) for name, ranks in of_ranks.items()}))
            assert sorted(collectives) == [
                *["c10d.allgather_.default"],
                *[ALL_REDUCE] * len({"none", "twin", *of_ranks} & {"none", "twin", "pair"}),
            ]
        assert counts == [0] * len(of_ranks)


def in_another_order(rank: int) -> tuple[Numbers, Numbers]:
    """Two groups, whose collectives the ranks start in another order; one that waits would wait for ever."""
    metrics = {"a": GlobalLoss(["a"]), "b": GlobalLoss(["b"], process_group=dist.new_group())}
    for metric in metrics.values():
        metric.update(torch.tensor([rank + 1.0], dtype=torch.float64), 1)
    turned = dict(reversed(metrics.items())) if rank else metrics
    return numbers(compute_all(turned)), numbers(compute_all(metrics))


def test_ranks_with_two_groups_in_another_order_do_not_wait_for_each_other(two_ranks: RankPool) -> None:
    oracle = {"a/loss/a": 1.5, "a/loss": 1.5, "b/loss/b": 1.5, "b/loss": 1.5}
    assert two_ranks.run(in_another_order) == [(oracle, oracle)] * 2


def outside(rank: int) -> tuple[str, int, Numbers]:
    """What a rank gets for a metric of a group that it is not in, beside one of all; and then for that one."""
    both = {"a": GlobalLoss(["a"]), "b": GlobalLoss(["b"], process_group=dist.new_group([0]))}
    for metric in both.values():
        metric.update(torch.ones(1), 1)
    message = ""
    if rank:
        with pytest.raises(ValueError, match="process_group") as caught:
            compute_all(both, reset=True)
        message = str(caught.value)
    return message, both["a"].update_count, numbers(compute_all({"a": both["a"]}))


def test_a_rank_outside_of_a_group_is_told_so_before_any_collective(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(outside)
    assert first == ("", 1, {"a/loss/a": 1.0, "a/loss": 1.0})
    assert second == (
        "process_group: got one that this process is not in, expected one that it is in",
        *first[1:],
    )


# Ranks that do not agree.


def loss_in(is_training: bool) -> MultiTaskLoss:
    """A loss that has rows in both modes, in one of them."""
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"])
    for mode in (not is_training, is_training):
        loss.train(mode)
        loss(torch.zeros(2, 2), torch.ones(2, 2))
    return loss


def metric_of(*tasks: str, **options: Any) -> GlobalLoss:
    metric = GlobalLoss(tasks, **options)
    metric.update(torch.ones(len(tasks)), 2)
    return metric


def quality_of(*tasks: str, **options: Any) -> RankingQuality:
    metric = RankingQuality(tasks, **options)
    ids = {name: torch.zeros(2, dtype=torch.int64) for name in options.get("segments", ())}
    metric.update(torch.zeros(2, len(tasks)), torch.ones(2, len(tasks)), segments=ids or None)
    return metric


# What the last rank has, and what the others do; and a part of the last one's error.
DIFFERENT: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "tasks": (lambda: metric_of("a", "b"), lambda: metric_of("a", "c"), "GlobalLoss of ('a', 'b')"),
    "order of tasks": (lambda: metric_of("a", "b"), lambda: metric_of("b", "a"), "GlobalLoss of ('a', 'b')"),
    "number of tasks": (lambda: metric_of("a", "b"), lambda: metric_of("a"), "GlobalLoss of ('a', 'b')"),
    "cuts": (lambda: {"x": metric_of("a"), "y": metric_of("b")}, lambda: {"x": metric_of("a", "b")}, "y/GlobalLoss"),
    "prefix": (lambda: {"x": metric_of("a")}, lambda: {"y": metric_of("a")}, "x/GlobalLoss of ('a',)"),
    "no prefix": (lambda: metric_of("a"), lambda: {"y": metric_of("a")}, "GlobalLoss of ('a',)"),
    "order": (
        lambda: {"x": metric_of("a"), "y": metric_of("a")},
        lambda: {"y": metric_of("a"), "x": metric_of("a")},
        "x/GlobalLoss of ('a',)\", \"y/GlobalLoss of ('a',)",
    ),
    "one more": (
        lambda: {"x": metric_of("a"), "y": quality_of("a")},
        lambda: {"x": metric_of("a")},
        "y/RankingQuality of ('a',)",
    ),
    "class": (lambda: metric_of("a", "b"), lambda: quality_of("a", "b"), "GlobalLoss of"),
    "window": (lambda: quality_of("a", window=2), lambda: quality_of("a"), "RankingQuality of"),
    "names of segments": (
        lambda: quality_of("a", segments={"country": ["DE", "US"]}),
        lambda: quality_of("a", segments={"country": ["US", "DE"]}),
        "RankingQuality of ('a',) by ('country=DE', 'country=US', 'country=other')",
    ),
    "number of segments": (
        lambda: quality_of("a", segments={"country": 2}),
        lambda: quality_of("a", segments={"country": 3}),
        "RankingQuality of ('a',) by ('country=0', 'country=1', 'country=other')",
    ),
    "counted faults": (lambda: metric_of("a"), lambda: metric_of("a", validate_args=True), "GlobalLoss of"),
    "mode": (lambda: loss_in(True), lambda: loss_in(False), "train_metric of ('a', 'b')"),
}


def differ(rank: int, name: str, is_async: bool) -> Any:
    """The error, whether the sums are what they were, and then what all ranks give that agree."""
    *sides, _ = DIFFERENT[name]
    given = sides[rank < dist.get_world_size() - 1]()
    metrics = list(nn.ModuleList(given.values() if isinstance(given, dict) else [given]).modules())
    kept = [(metric, metric.totals.clone()) for metric in metrics if isinstance(metric, GlobalLoss | RankingQuality)]
    if is_async:
        pending = compute_all_async(given)
        texts = [error_of(pending.wait) for _ in range(2)]
    else:
        texts = [error_of(lambda: compute_all(given, reset=True)) for _ in range(2)]
    assert texts[0] == texts[1]
    agreed = numbers(compute_all(sides[0]()))
    return texts[0], all(torch.equal(metric.totals, totals) for metric, totals in kept), agreed


@pytest.mark.parametrize("is_async", LATER)
@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_differ_are_told_so_and_keep_their_sums(ranks: RankPool, name: str, is_async: bool) -> None:
    answers = ranks.run(differ, name, is_async)
    for text, kept, agreed in answers:
        assert text.startswith("metrics: got [")
        assert text.endswith("on this rank, expected the same, in this order, on all ranks")
        assert kept
        assert repr(agreed) == repr(answers[0][2]) != "{}"
    assert DIFFERENT[name][2] in answers[-1][0]


class Refusing(TaskMetric):
    """A metric that makes no result."""

    def update(self) -> None:
        """Add a row."""
        self._add((torch.ones(1),))

    def _keys(self) -> dict[str, bool | None]:
        return {"refusing": None}

    def _results(self, _: Tensor) -> Sequence[Tensor]:
        raise ZeroDivisionError


def refuse(rank: int, differs: bool) -> str:
    """The error of ranks that ask for a metric without a result, and differ or not."""
    metric = Refusing(["b" if rank and differs else "a"], sums=1)
    metric.update()
    with pytest.raises((RuntimeError, ZeroDivisionError)) as caught:
        compute_all(metric, reset=True)
    return f"{caught.type.__name__}, {metric.update_count}"


@pytest.mark.parametrize(("differs", "error"), [(True, "RuntimeError, 1"), (False, "ZeroDivisionError, 1")])
def test_a_result_of_sums_that_are_not_sound_hides_no_error(two_ranks: RankPool, differs: bool, error: str) -> None:
    assert two_ranks.run(refuse, differs) == [error] * 2


def not_finite(rank: int) -> tuple[str, list[bool], Numbers, Numbers]:
    """One metric of two is an error on all ranks, since a rank has added what is not finite."""
    metrics = {"good": metric_of("a"), "bad": metric_of("b", nan_strategy="error")}
    if rank:
        metrics["bad"].update(torch.tensor([math.nan]), 1)
    totals = [metric.totals.clone() for metric in metrics.values()]
    text = error_of(lambda: compute_all(metrics, reset=True))
    kept = [torch.equal(metric.totals, each) for metric, each in zip(metrics.values(), totals)]
    metrics["bad"].nan_strategy = "ignore"
    return text, kept, numbers(compute_all(metrics, reset=True)), numbers(compute_all_async(refill(metrics)).wait())


def refill(metrics: dict[str, GlobalLoss]) -> dict[str, GlobalLoss]:
    for metric in metrics.values():
        metric.update(torch.full((1,), 3.0), 2)
    return metrics


def test_what_is_not_finite_on_one_rank_keeps_all_sums_on_every_rank(two_ranks: RankPool) -> None:
    for text, kept, found, later in two_ranks.run(not_finite):
        assert text == "GlobalLoss: skipped updates that were not finite: b: 1"
        assert kept == [True, True]
        assert found == {"good/loss/a": 0.5, "good/loss": 0.5, "bad/loss/b": 0.5, "bad/loss": 0.5}
        assert later == dict.fromkeys(found, 1.5)


def fail_in_the_second(rank: int, is_async: bool) -> tuple[str, Numbers]:
    """The collective of the first group is done, or under way, and that of the second fails, on all ranks."""
    metrics = {"a": metric_of("a"), "b": metric_of("b", process_group=dist.new_group())}
    whole = dist.all_reduce

    def broken(values: Tensor, group: Any = None, **options: Any) -> Any:
        if group is metrics["b"].process_group:
            raise RuntimeError("the network is down")
        return whole(values, group=group, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_reduce", broken)
        text = error_of(lambda: ask(metrics, is_async, reset=True))
    return text, numbers(compute_all(refill(metrics)))


@pytest.mark.parametrize("is_async", LATER)
def test_where_one_groups_collective_fails_no_sums_are_lost(two_ranks: RankPool, is_async: bool) -> None:
    call = "compute_all_async()" if is_async else "compute_all()"
    for text, found in two_ranks.run(fail_in_the_second, is_async):
        assert text.startswith(f"{call}: the collective failed; every rank has to call it")
        assert text.endswith("the network is down")
        assert found == {"a/loss/a": 1.0, "a/loss": 1.0, "b/loss/b": 1.0, "b/loss": 1.0}


# Sums of a checkpoint.


def save(rank: int, kind: Kind, batches: ByRank) -> dict[str, Any]:
    metric = fed(persistent(kind), batches[rank])
    with global_sums(metric):
        state: dict[str, Any] = metric.state_dict()
    return state


def resume(rank: int, kind: Kind, state: dict[str, Any], loads: list[int], later: ByRank) -> list[Any]:
    """On the ranks that load: the results of all, or the error, and after a reset those of later batches alone."""
    metric, other = persistent(kind), metric_of("x")
    if rank in loads:
        metric.load_state_dict(state)
    fed(metric, later[rank])
    totals = metric.totals.clone()
    given = {"kept": metric, "x": other}
    text = error_of(lambda: compute_all(given))
    assert error_of(lambda: compute_all(given, reset=bool(text))) == text
    kept = torch.equal(metric.totals, totals)
    found = {} if text else numbers(compute_all(given, reset=True))
    metric.reset()
    return [text, kept, found, numbers(compute_all({"kept": fed(metric, later[rank])}))]


@pytest.mark.parametrize("loads", [[0, 1], [0], [1]])
@pytest.mark.parametrize("name", ["losses", "qualities with a window"])
def test_carried_sums_count_once_and_are_reset_with_the_others(
    two_ranks: RankPool, name: str, loads: list[int]
) -> None:
    kind = KINDS[name]
    saved, later = batches_of(kind, [2, 1]), batches_of(kind, [3, 2], seed=50)
    state = two_ranks.run(save, kind, saved)[0]
    assert list(state) == [KEY]
    whole = kind.without_windows().expected(*saved, *later)
    for text, kept, found, after in two_ranks.run(resume, kind, state, loads, later):
        assert kept
        assert_close(after, {f"kept/{key}": value for key, value in kind.expected(*later).items()})
        if loads == [1]:
            assert text.startswith("got sums of a checkpoint that the first rank")
            continue
        assert text == ""
        assert_close({key: found[f"kept/{key}"] for key in whole}, whole)
        assert found["x/loss"] == 0.5
