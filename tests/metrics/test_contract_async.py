"""What every metric promises of ``compute_async()``: the result of the moment of the call, without waiting for it."""

from __future__ import annotations

import copy
import gc
import math
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from benchmarks.counts import CollectiveLog, KernelLog
from tests.support.metrics import Kind, Summing, expect_result_of, numbers_of_this_rank, of_every_kind
from tests.support.patience import PATIENCE, SECONDS
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, MultiTaskLoss, PendingResult, RankingQuality, compute_all_async

Numbers = dict[str, float]


AskLater = Callable[[Summing], PendingResult[dict[str, Tensor]]]


def by_itself(metric: Summing) -> PendingResult[dict[str, Tensor]]:
    """A metric's pending result, from the metric."""
    return metric.compute_async()


def jointly(metric: Summing) -> PendingResult[dict[str, Tensor]]:
    """The same from the call for any number of metrics."""
    return compute_all_async(metric)


either_way: Callable[[Any], Any] = pytest.mark.parametrize("ask", [by_itself, jointly])


@of_every_kind
@either_way
def test_it_is_the_result_of_the_moment_of_the_call(kind: Kind, ask: AskLater) -> None:
    batches = kind.batches(4)
    metric = fed(kind.make(), batches[:2])
    pending = [ask(metric)]
    fed(metric, batches[2:])
    pending.append(ask(metric))
    metric.reset()
    fed(metric, batches[3:])
    pending.append(ask(metric))
    expected = [kind.expected(batches[:2]), kind.expected(batches), kind.expected(batches[3:])]
    expect_result_of(kind, metric, batches[3:])
    del metric
    gc.collect()
    for each, oracle in zip(pending, expected):
        assert each.is_completed()
        result = each.wait()
        assert_close(numbers(result), oracle)
        assert each.wait() is result
        assert all(value.dtype == torch.float64 and not value.requires_grad for value in result.values())


@of_every_kind
def test_the_call_reads_nothing_from_the_device(kind: Kind) -> None:
    """Which would wait for it."""
    metric = fed(kind.make(), kind.batches(2))
    view = metric.scalar(metric.keys()[0])
    view.reset()
    fed(metric, kind.batches(1))
    with KernelLog() as log:
        for each in (metric, view):
            each.compute_async()
        compute_all_async(metric, reset=True)
    assert log.names
    assert not [name for name in log.names if "_local_scalar_dense" in name or "_to_copy" in name or "nonzero" in name]


def run_ahead(rank: int, kind: Kind, ask: AskLater, store: str) -> tuple[list[Numbers], list[bool], int]:
    """The first rank goes on through its steps before the others start; the results, and whether they were there."""
    signs = FileStore(store, dist.get_world_size())
    batches = later(kind, rank)
    if rank:
        signs.wait(["ready"], PATIENCE)
    metric = kind.make()
    pending: list[PendingResult[dict[str, Tensor]]] = []
    with CollectiveLog() as log:
        for batch in batches:
            pending.append(ask(fed(metric, [batch])))
            metric.reset()
    completed = [each.is_completed() for each in pending]
    signs.set("ready", "yes")
    return [numbers(each.wait()) for each in pending], completed, len(log.names)


def later(kind: Kind, rank: int) -> list[Any]:
    """Each rank's batches, one of which has no rows."""
    return [*kind.batches(4, seed=100 * rank), kind.batch(0, rows=0 if kind.of is RankingQuality else 1)]


@of_every_kind
@either_way
def test_no_call_waits_for_a_slower_rank(ranks: RankPool, kind: Kind, ask: AskLater, tmp_path: Path) -> None:
    steps = list(zip(*(later(kind, rank) for rank in range(ranks.world_size))))
    answers = ranks.run(run_ahead, kind, ask, str(tmp_path / "store"))
    assert answers[0][1] == [False] * len(steps)
    for results, _, collectives in answers:
        assert collectives == len(steps)
        for found, step in zip(results, steps):
            assert_close(found, kind.expected(*([batch] for batch in step)))


def many_pending(rank: int) -> list[float]:
    """Two hundred are started, every other one is dropped, and some are read before others and in another order."""
    metric = GlobalLoss(["a"])
    kept = {}
    for step in range(200):
        metric.reset()
        metric.update(torch.tensor([float(step * (rank + 1))], dtype=torch.float64), 1)
        pending = metric.compute_async()
        if step % 2:
            kept[step] = pending
    del pending
    gc.collect()
    # One that waits comes after them; but gloo's threads are two, and the other may still be at the one before it.
    assert metric.compute()["loss"].item() == 199 * 1.5
    deadline = time.monotonic() + SECONDS
    while not all(each.is_completed() for each in kept.values()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    order = sorted(kept, reverse=rank == 0)
    found = {step: kept[step].wait()["loss"].item() for step in order}
    return [found[step] for step in sorted(found)]


def test_many_may_be_under_way_and_any_of_them_dropped(two_ranks: RankPool) -> None:
    assert two_ranks.run(many_pending) == [[step * 1.5 for step in range(1, 200, 2)]] * 2


def leave(rank: int, ask: AskLater, store: str) -> tuple[str, bool, Numbers]:
    """One rank leaves once the other waits for it; that one's error, and its own sums afterwards."""
    signs = FileStore(store, 2)
    metric = GlobalLoss(["a"])
    metric.update(torch.tensor([3.0]), 2)
    if rank:
        signs.wait(["pending"], PATIENCE)
        dist.destroy_process_group()
        return "", True, {}
    pending = ask(metric)
    signs.set("pending", "yes")
    try:
        pending.wait()
    except RuntimeError as error:
        message = str(error)
    completed = pending.is_completed()
    return message, completed, numbers_of_this_rank(metric)


@either_way
def test_a_rank_that_is_gone_is_an_error_at_wait(tmp_path: Path, ask: AskLater) -> None:
    pool = RankPool(2)
    try:
        message, completed, local = pool.run(leave, ask, str(tmp_path / "store"))[0]
    finally:
        pool.stop()
    assert message
    assert completed
    assert local == {"loss/a": 1.5, "loss": 1.5}


def never_call(rank: int) -> tuple[str, Numbers]:
    """One rank of a group whose time is short never calls; the other's error, and its own sums afterwards."""
    group = dist.new_group([0, 1], timeout=PATIENCE)
    dist.barrier(group)
    _set_pg_timeout(timedelta(seconds=1), group)
    metric = GlobalLoss(["a"], process_group=group)
    metric.update(torch.tensor([3.0]), 2)
    message = ""
    if rank == 0:
        try:
            metric.compute_async().wait()
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    return message, numbers_of_this_rank(metric)


def test_a_rank_that_never_calls_is_an_error_at_wait() -> None:
    pool = RankPool(2)
    try:
        answers = pool.run(never_call)
    finally:
        pool.stop()
    assert answers[0][0]
    assert [local for _, local in answers] == [{"loss/a": 1.5, "loss": 1.5}, {"loss/a": 1.5, "loss": 1.5}]


def differ(rank: int, ask: AskLater) -> tuple[str, str]:
    """What is raised where ranks mean different tasks; a second time too."""
    metric = GlobalLoss(["like", "reply"] if rank else ["reply", "like"])
    metric.update(torch.ones(2), 1)
    pending, messages = ask(metric), []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            pending.wait()
        messages.append(str(caught.value))
    return messages[0], messages[1]


@either_way
def test_ranks_that_mean_different_tasks_are_an_error_at_wait(two_ranks: RankPool, ask: AskLater) -> None:
    for first, second in two_ranks.run(differ, ask):
        assert first == second
        assert "'like'" in first
        assert "on all ranks" in first


@of_every_kind
@either_way
def test_warnings_and_errors_of_updates_come_at_wait(kind: Kind, ask: AskLater) -> None:
    bad = kind.changed(kind.batch(0), 0, math.nan)
    metric = fed(kind.make(), [bad])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warned = ask(metric)
        metric.nan_strategy = "error"
        raised = ask(metric)
        metric.nan_strategy = "ignore"
        silent = ask(metric)
        metric.reset()
        empty = ask(metric)
        silent.wait()
    with pytest.warns(UserWarning, match="not finite"):
        warned.wait()
    with pytest.raises(RuntimeError, match="not finite"):
        raised.wait()
    with pytest.warns(UserWarning, match="before update"):
        assert all(math.isnan(value) or value == 0 for value in numbers(empty.wait()).values())


class Learned(nn.Module):
    """A reduction with a parameter and a buffer, that counts its calls."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(10.0, dtype=torch.float64))

    def forward(self, losses: Tensor) -> Tensor:
        """Σ scale·loss + shift, which is changed in place."""
        self.shift.add_(1.0)
        return (self.scale * losses).sum() + self.shift


def change_settings(rank: int, ask: AskLater) -> list[Numbers]:
    """Results that were started before the settings changed, and after."""
    learned = Learned()
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], "mean", learned, task_weights=[1.0, 1.0], global_batch=True)
    results = []
    for metric in (loss.train_metric, GlobalLoss(["a", "b"], "mean", learned)):
        with torch.no_grad():
            learned.scale.copy_(torch.tensor([1.0, 2.0]))
            learned.shift.fill_(10.0)
        loss.task_weights = [1.0, 1.0]
        metric.update(torch.tensor([3.0, 1.0], dtype=torch.float64), 2 - rank)
        pending = ask(metric)
        loss.task_weights = [100.0, 100.0]
        with torch.no_grad():
            learned.scale.mul_(3.0)
            learned.shift.mul_(3.0)
        results += [numbers(pending.wait()), numbers(pending.wait()), numbers(metric.compute())]
        assert learned.shift == 30.0  # compute() leaves a module as it is
    return results


@pytest.mark.parametrize("world_size", [1, 2])
@either_way
def test_it_has_the_settings_and_the_parameters_of_the_call(
    two_ranks: RankPool, world_size: int, ask: AskLater
) -> None:
    weight = 2.0 if world_size == 1 else 3.0
    a, b = 3.0 * world_size / weight, 1.0 * world_size / weight
    for first, again, after, other, _, other_after in (
        [change_settings(0, ask)] if world_size == 1 else two_ranks.run(change_settings, ask)
    ):
        assert first == again == other == pytest.approx({"loss/a": a, "loss/b": b, "loss": a + 2 * b + 11})
        assert after["loss"] == pytest.approx(100 * (3 * a + 6 * b) + 31)
        assert other_after["loss"] == pytest.approx(3 * a + 6 * b + 31)


class Schedule:
    """A number that is no tensor, in an object that is no module."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Scheduled(nn.Module):
    """A reduction that depends on its mode, on attributes of all kinds, and on those of a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.factor = 2.0
        self.factors = {"all": [Schedule(3.0)]}
        self.past = 5.0 * self.scale  # a tensor with a graph
        self.reduce: Callable[[Tensor], Tensor] = lambda losses: losses.sum()
        self.group = dist.group.WORLD if dist.is_initialized() else None
        self.inner = nn.Dropout(0.0)
        self.inner.register_forward_hook(self.add_bias)
        self.bias = 0.0
        self.calls = 0

    def add_bias(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A hook that is a method of the module."""
        return (output if output.ndim == 0 else inputs[0]) + self.bias

    def forward(self, losses: Tensor) -> Tensor:
        """A product of all of them."""
        self.calls += 1
        factor: Tensor = self.factor * self.factors["all"][0].factor * self.past * self.scale
        reduced: Tensor = self.inner(self.reduce(losses))
        return reduced * factor * (7.0 if self.training else 1.0)

    def change(self) -> None:
        """Change all that the result depends on."""
        self.eval()
        self.factor, self.factors["all"][0].factor, self.bias = 100.0, 100.0, 100.0
        self.past = self.past * 100.0
        self.reduce = lambda losses: 100.0 * losses.sum()
        with torch.no_grad():
            self.scale.mul_(100.0)

    def __deepcopy__(self, memo: Any) -> Scheduled:
        """Copies are counted, and nothing else is different."""
        Scheduled.copies += 1
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    copies = 0


WRAPPED: dict[str, Callable[[Scheduled], Any]] = {
    "plain": lambda module: module,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "in another": lambda module: nn.Sequential(module, nn.Identity()),
}


def change_a_reduction(rank: int, name: str) -> tuple[float, float, float, int]:
    """The global loss of before a change and of after it, that of the same metric at once, and the calls of it."""
    module = Scheduled()
    wrap = DistributedDataParallel if name == "distributed" else WRAPPED[name]
    metric = GlobalLoss(["a", "b"], "mean", wrap(module))
    metric.update(torch.tensor([3.0, 1.0]), 2)
    at_once = metric.compute()["loss"].item()
    pending = metric.compute_async()
    calls = module.calls
    module.change()
    before = pending.wait()["loss"].item()
    calls = module.calls - calls
    return before, metric.compute()["loss"].item(), at_once, calls


BEFORE, AFTER = 2.0 * (2.0 * 3.0 * 5.0 * 7.0), (200.0 + 100.0) * (100.0 * 100.0 * 500.0 * 100.0)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_module_is_as_it_was_at_the_call_with_all_that_it_has(name: str) -> None:
    before, after, at_once, calls = change_a_reduction(0, name)
    assert before == at_once == pytest.approx(BEFORE)
    assert after == pytest.approx(AFTER)
    assert calls == 0  # a copy was called


@pytest.mark.parametrize("name", [*WRAPPED, "distributed"])
def test_so_it_is_on_ranks_and_with_their_process_group(two_ranks: RankPool, name: str) -> None:
    for before, after, at_once, _ in two_ranks.run(change_a_reduction, name):
        assert before == at_once == pytest.approx(BEFORE)
        assert after == pytest.approx(AFTER)


def test_a_module_is_copied_for_a_later_result_alone() -> None:
    metric = GlobalLoss(["a", "b"], "mean", Scheduled())
    Scheduled.copies = 0
    metric(torch.tensor([3.0, 1.0]), 2)
    metric.compute()
    metric.scalar("loss").compute()
    assert Scheduled.copies == 0
    metric.compute_async().wait()
    assert Scheduled.copies == 1


def test_a_module_that_can_not_be_copied_is_refused_at_the_call() -> None:
    module: Any = Scheduled()
    module.lock = threading.Lock()
    metric = GlobalLoss(["a", "b"], "mean", module)
    metric.update(torch.tensor([3.0, 1.0]), 2)
    with pytest.raises(TypeError, match=r"^global_reduction: got a module that can't be copied .*lock.*expected one"):
        metric.compute_async()
    assert metric.compute()["loss"].item() == pytest.approx(BEFORE)


def test_a_copy_is_no_second_hook_of_the_gradients(two_ranks: RankPool) -> None:
    for first, second in two_ranks.run(train_beside_a_pending_result):
        assert first == second


def train_beside_a_pending_result(rank: int) -> tuple[float, float]:
    """The gradient of a distributed reduction's parameter, without and with a result that is pending."""
    gradients = []
    for is_logged in (False, True):
        reduction = DistributedDataParallel(Learned())
        loss = MultiTaskLoss("bce_with_logits", ["a", "b"], "mean", reduction, global_batch=True)
        losses = loss(torch.ones(3 + rank, 2, dtype=torch.float64), torch.zeros(3 + rank, 2))
        pending = loss.train_metric.compute_async() if is_logged else None
        losses["loss"].backward()
        if pending is not None:
            pending.wait()
        gradients.append(reduction.module.scale.grad.sum().item())
    return gradients[0], gradients[1]


def views_of(rank: int, kind: Kind) -> list[tuple[float, float]]:
    """What views gave, and what the same views' compute() had given."""
    metric = fed(kind.make(), kind.batches(2, seed=rank))
    views = [metric.scalar(key) for key in kind.make().keys()]  # noqa: SIM118
    views[0].reset()
    fed(metric, kind.batches(2, seed=10 + rank))
    expected = [view.compute() for view in views]
    pending = [view.compute_async() for view in views]
    fed(metric, kind.batches(1))
    views[0].reset()
    metric.reset()
    return [(each.wait().item(), value.item()) for each, value in zip(pending, expected)]


@of_every_kind
def test_scalar_views_have_it_too(two_ranks: RankPool, kind: Kind) -> None:
    for pairs in ([views_of(0, kind)], two_ranks.run(views_of, kind)):
        for found, expected in (pair for each in pairs for pair in each):
            assert found == pytest.approx(expected, rel=1e-15, nan_ok=True)


def other_ways(rank: int, kind: Kind, ask: AskLater) -> list[Numbers]:
    """With a gather of the user's own, on this rank alone, and between sync() and unsync()."""

    def gather(values: Tensor, group: Any = None) -> list[Tensor]:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values)
        return parts

    metrics = [fed(kind.make(**options), kind.batches(2, seed=rank)) for options in ({"dist_sync_fn": gather}, {})]
    pending = [ask(metric) for metric in metrics]
    metrics[1].sync_on_compute = False
    pending.append(ask(metrics[1]))
    metrics[1].sync()
    pending.append(ask(metrics[1]))
    metrics[1].unsync()
    for metric in metrics:
        metric.reset()
    return [numbers(each.wait()) for each in pending]


@of_every_kind
@either_way
def test_it_goes_the_ways_of_compute(two_ranks: RankPool, kind: Kind, ask: AskLater) -> None:
    batches = [kind.batches(2, seed=rank) for rank in range(2)]
    for rank, (gathered, plain, alone, synced) in enumerate(two_ranks.run(other_ways, kind, ask)):
        for found in (gathered, plain, synced):
            assert_close(found, kind.expected(*batches))
        assert_close(alone, kind.expected(batches[rank]))


def train_and_log(rank: int) -> list[tuple[Numbers, Numbers, float]]:
    """A training that logs each step's losses of all ranks one step later; beside them those that forward gave."""
    torch.manual_seed(0)
    tasks = ["a", "b"]
    model = nn.Linear(3, 2, dtype=torch.float64)
    loss = MultiTaskLoss("bce_with_logits", tasks, global_batch=True)
    wrapped = DistributedDataParallel(nn.ModuleDict({"heads": model, "loss": loss})["heads"])
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    logged, seen, pending = [], [], None
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + rank)
        features = torch.randn(3 + 4 * rank, 3, dtype=torch.float64, generator=generator)
        losses = loss(wrapped(features), features[:, :2].sigmoid())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        if pending is not None:
            logged.append(numbers(pending.wait()))
        pending = loss.train_metric.compute_async()
        loss.train_metric.reset()
        seen.append(numbers({key: value.detach() for key, value in losses.items()}))
    assert pending is not None
    logged.append(numbers(pending.wait()))
    return [(found, expected, model.weight.sum().item()) for found, expected in zip(logged, seen)]


def test_a_training_logs_every_step_one_step_later(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(train_and_log)
    assert first == second
    for found, expected, _ in first:
        assert found == pytest.approx(expected, rel=1e-12)
    assert len({found["loss"] for found, _, _ in first}) == 6


class Holding(nn.Module):
    """A module that has its parameter in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.all = [self.scale]

    def forward(self, losses: Tensor) -> Tensor:
        """The losses, scaled."""
        return (losses * self.all[0]).sum()


class Scaling(nn.Module):
    """A module that may be scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, losses: Tensor) -> Tensor:
        """The losses, scaled."""
        return (losses * self.scale).sum()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("is_scripted", [False, True])
def test_a_parameter_is_that_of_the_call_wherever_a_module_has_it(is_scripted: bool) -> None:
    reduction = torch.jit.script(Scaling()) if is_scripted else Holding()
    metric = GlobalLoss(["like", "reply"], "mean", reduction)
    metric.update(torch.tensor([1.0, 2.0]), 1)
    pending = metric.compute_async()
    with torch.no_grad():
        reduction.scale.mul_(10)
    assert pending.wait()["loss"].item() == 3.0
    assert metric.compute()["loss"].item() == 30.0
