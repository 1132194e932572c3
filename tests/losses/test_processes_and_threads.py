"""A loss in another process is a loss of its own; in another thread it is the same one, and no row is lost."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.support import reference
from tests.support.metrics import weights_of
from tests.support.patience import SECONDS
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality
from twloss._sums.running_sums import LOCK

Kept = GlobalLoss | RankingQuality
TASKS = ["like", "reply"]
BEFORE = (5, 0.5)
UPDATES = 2000


def rows(count: int, logit: float) -> tuple[Tensor, Tensor]:
    """Rows of one logit, all of them positive."""
    return torch.full((count, 2), logit, dtype=torch.float64), torch.ones(count, 2)


def new_loss(*, quality: bool | RankingQuality, has_sums: bool) -> MultiTaskLoss:
    loss = MultiTaskLoss("bce_with_logits", TASKS, quality=quality)
    if has_sums:
        loss(*rows(*BEFORE))
        loss.eval()(*rows(*BEFORE))
        loss.train()
    return loss


def new_losses() -> list[MultiTaskLoss]:
    return [
        new_loss(quality=quality, has_sums=has_sums)
        for quality in (False, RankingQuality(TASKS, window=2))
        for has_sums in (False, True)
    ]


def metrics_of(loss: MultiTaskLoss) -> list[GlobalLoss | RankingQuality]:
    metrics: list[GlobalLoss | RankingQuality] = [loss.train_metric, loss.eval_metric]
    return metrics + ([loss.train_quality, loss.eval_quality] if hasattr(loss, "train_quality") else [])


def totals_of(loss: MultiTaskLoss) -> list[Tensor]:
    return [metric.totals for metric in metrics_of(loss)]


def of_process(rank: int) -> tuple[int, float]:
    """How many rows a process adds at each of its two steps, and their logit."""
    return 3 + 4 * rank, 1.0 + rank


def train(rank: int, losses: list[MultiTaskLoss], directory: str) -> None:
    """Two steps of a process, and what its sums are then."""
    torch.set_num_threads(1)
    results = []
    for loss in losses:
        for _ in range(2):
            loss(*rows(*of_process(rank)))
        result = {key: value.item() for key, value in loss.train_metric.compute().items()}
        result["rows"] = weights_of(loss.train_metric)[0]
        if hasattr(loss, "train_quality"):
            result.update({key: value.item() for key, value in loss.train_quality.compute().items()})
        results.append(result)
    Path(directory, f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.exhaustive
def test_each_spawned_process_has_sums_of_its_own(tmp_path: Path) -> None:
    losses = new_losses()
    before = copy.deepcopy([totals_of(loss) for loss in losses])
    mp.spawn(train, args=(losses, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        added, logit = of_process(rank)
        for result, has_sums, has_quality in zip(results, [False, True] * 2, [False] * 2 + [True] * 2):
            given = BEFORE[0] if has_sums else 0
            count = given + 2 * added
            mean = (given * reference.softplus(-BEFORE[1]) + 2 * added * reference.softplus(-logit)) / count
            assert result["rows"] == pytest.approx(count, rel=1e-12)
            assert [result[key] for key in ("loss", "loss/like", "loss/reply")] == pytest.approx([mean] * 3, rel=1e-12)
            if has_quality:
                assert result["weight/like"] == count
                assert result["window_weight/like"] == 2 * added
                assert result["logloss/reply"] == pytest.approx(mean, rel=1e-12)
                assert result["window_logloss/reply"] == pytest.approx(reference.softplus(-logit), rel=1e-12)
    for loss, kept in zip(losses, before):
        assert all(torch.equal(totals, each) for totals, each in zip(totals_of(loss), kept))
        assert not any(totals.is_shared() for totals in totals_of(loss))


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "pickle of multiprocessing": lambda loss: pickle.loads(ForkingPickler.dumps(loss)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_shares_no_memory(copied: Callable[[MultiTaskLoss], MultiTaskLoss]) -> None:
    for loss in new_losses():
        twin = copied(loss)
        ours, theirs = totals_of(loss), totals_of(twin)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        assert len({totals.untyped_storage().data_ptr() for totals in [*ours, *theirs]}) == 2 * len(ours)
        assert not any(totals.is_shared() for totals in [*ours, *theirs])
        kept = copy.deepcopy(ours)
        twin(*rows(7, 2.0))
        twin.eval()(*rows(9, 2.0))
        twin.eval_metric.reset()
        assert all(torch.equal(a, b) for a, b in zip(ours, kept))
        loss.train_metric.reset()
        counted = 7.0 + BEFORE[0] * loss.eval_metric.update_count
        assert weights_of(twin.train_metric) == pytest.approx([counted] * 2, rel=1e-12)


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    """Threads that take turns a hundred times as often as they do by default."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_hasty_threads")
@pytest.mark.parametrize("from_view", [False, True], ids=["metric", "view"])
def test_a_thread_that_logs_loses_no_row_and_sees_whole_updates(from_view: bool) -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, quality=RankingQuality(TASKS, window=2))
    batch = rows(3, 0.5)
    loss(*batch)
    started, done = Event(), Event()
    view, quality_view = loss.train_metric.scalar("loss"), loss.train_quality.scalar("logloss/like")

    def log() -> set[float]:
        seen = set()
        while not done.wait(2e-4):
            if from_view:
                seen |= {view.compute().item(), quality_view.compute().item()}
            else:
                seen |= {loss.train_metric.compute()["loss"].item()}
                seen |= {loss.train_quality.compute()["window_logloss/reply"].item()}
            started.set()
        return seen

    with ThreadPoolExecutor(1) as pool:
        logged = pool.submit(log)
        try:
            assert started.wait(SECONDS)
            for _ in range(UPDATES - 1):
                loss(*batch)
        finally:
            done.set()
        seen = logged.result()
    # All rows are alike, so that a loss without its weight would be another number.
    assert seen
    assert all(each == pytest.approx(reference.softplus(-0.5), rel=1e-9) for each in seen)
    assert weights_of(loss.train_metric) == pytest.approx([3.0 * UPDATES] * 2, rel=1e-9)
    assert (loss.train_metric.update_count, loss.train_quality.update_count) == (UPDATES, UPDATES)
    assert loss.train_quality.compute()["weight/like"].item() == 3 * UPDATES
    assert loss.train_metric.compute()["loss/like"].item() == pytest.approx(reference.softplus(-0.5), rel=1e-9)


@pytest.mark.usefixtures("_hasty_threads")
@pytest.mark.parametrize("other", ["forward", "update", "compute"])
def test_calls_of_a_metric_from_two_threads_are_all_counted(other: str) -> None:
    metric = GlobalLoss(TASKS)
    metric.update(torch.tensor([2.0, 4.0]), 2)

    def call(how: str) -> None:
        for step in range(UPDATES // 2):
            if how == "compute":
                metric.compute()
                continue
            loss_sum = torch.tensor([2.0, 4.0]) * (step + 1)
            if how == "update":
                metric.update(loss_sum, 2)
            else:
                assert metric(loss_sum, 2)["loss/like"].item() == step + 1

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(call, how) for how in ("forward", other)]:
            each.result()
    steps = UPDATES // 2
    feeders = 1 if other == "compute" else 2
    assert metric.update_count == 1 + feeders * steps
    assert weights_of(metric) == pytest.approx([2.0 * (1 + feeders * steps)] * 2, rel=1e-12)
    total = math.fsum([1.0, feeders * steps * (steps + 1) / 2])
    assert metric.compute()["loss/like"].item() == pytest.approx(total / (1 + feeders * steps), rel=1e-12)


def can_be_taken_by_another_thread(lock: Any) -> bool:
    def take() -> bool:
        taken: bool = lock.acquire(blocking=False)
        if taken:
            lock.release()
        return taken

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(take).result()


ACCESSES: dict[str, Callable[[Kept], Any]] = {
    "compute": lambda metric: metric.compute(),
    "compute_async": lambda metric: metric.compute_async(),
    "reset of a view": lambda metric: metric.scalar(metric.keys()[0]).reset(),
    "metric_state": lambda metric: metric.metric_state,
    "merge_state": lambda metric: metric.merge_state(metric),
    "state_dict": lambda metric: metric.state_dict(),
    "load_state_dict": lambda metric: metric.load_state_dict(metric.state_dict()),
    "forward": lambda metric: metric(torch.zeros(1), torch.zeros(1)),
    "update": lambda metric: metric.update(torch.zeros(1), torch.zeros(1)),
}


@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)
@pytest.mark.parametrize("make", [GlobalLoss, partial(RankingQuality, window=2)], ids=["loss", "quality"])
def test_no_other_thread_comes_in_while_the_sums_are_read_or_changed(
    make: Callable[[None], Kept], access: Callable[[Kept], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = make(None)
    metric.persistent(True)
    metric.update(torch.zeros(1), torch.zeros(1))
    assert can_be_taken_by_another_thread(LOCK)
    seen: list[bool] = []

    def watched(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(can_be_taken_by_another_thread(LOCK))
        return original(*args, **kwargs)

    layout = metric._format
    for name in ("add", "read", "read_horizons"):
        monkeypatch.setattr(layout, name, partial(watched, getattr(layout, name)))
    access(metric)
    assert seen
    assert not any(seen)


def test_a_fork_while_another_thread_computes_leaves_a_child_that_can_update() -> None:
    metric = GlobalLoss(["a"])
    metric.update(torch.ones(1), 1.0)
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            metric.compute()

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(int(SECONDS))  # a child that hangs ends by it
                metric.update(torch.ones(1), 1.0)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def test_a_signals_handler_may_compute_while_it_interrupts_an_update() -> None:
    metric = GlobalLoss(["a"])
    metric.update(torch.ones(1), 1.0)  # without data, compute() warns
    values: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: values.append(metric.compute()["loss"].item()))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        for _ in range(19_999):
            metric.update(torch.ones(1), 1.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert metric.update_count == 20_000
    assert values


def test_states_that_are_merged_while_another_thread_updates_lose_no_row() -> None:
    metric, other = GlobalLoss(["a"]), GlobalLoss(["a"])
    other.update(torch.ones(1), 1.0)

    def update() -> None:
        for _ in range(5000):
            metric.update(torch.ones(1), 1.0)

    thread = threading.Thread(target=update)
    thread.start()
    merged = 0
    while thread.is_alive():
        metric.merge_state(other.metric_state)
        merged += 1
    thread.join()
    assert metric.update_count == 5000 + merged


def test_a_copy_of_a_compiled_loss_counts_by_itself() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"])
    loss.compile(backend="eager")
    logits, labels = torch.zeros(3, 2), torch.ones(3, 2)
    loss(logits, labels)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        copied(logits, labels)
        assert (copied.train_metric.update_count, loss.train_metric.update_count) == (2, 1)
