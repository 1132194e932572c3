"""log_every_step: what a step loses to the log of its losses over all ranks, where one rank is slower than the others.

A small ranker within DistributedDataParallel, on real gloo ranks, of which the last sleeps for 5 ms after each step of
its optimizer. Logged by one get_global_loss_detached a task and one for all; by compute() and reset(); by
compute_async() and reset(), read one step later. The first rank's clock counts, from the end of its optimizer step to
the end of the log. The whole step is beside it: a rank that did not wait in the log waits in the next backward, as DDP
has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.paired import Timings, no_collector
from benchmarks.ranks import run_on_ranks
from benchmarks.row import Row, at_most, overhead
from benchmarks.workload import Setting
from twloss import GlobalLoss, MultiTaskLoss, PendingResult, get_global_loss_detached

__all__ = ["log_every_step"]

TASKS, ROWS, FEATURES = 10, 1024, 32
SLOWER_SECONDS = 5e-3
NONE, DETACHED, COMPUTE, ASYNC = "no log", "get_global_loss_detached", "compute()", "compute_async()"

Losses = dict[str, Tensor]
Log = Callable[[Losses], object]


def log_every_step(setting: Setting) -> Iterator[Row]:
    """Each step's losses over all ranks, logged with and without waiting for a slower one."""
    for world_size in (2,) if setting.quick else (2, 4):
        logs, steps = run_on_ranks(world_size, _measure, 2 if setting.quick else 40)[0]
        case = f"{world_size} ranks"
        yield overhead(f"{case}, log of a step", logs, ASYNC, COMPUTE, at_most(1 / 5))
        yield overhead(f"{case}, log of a step", logs, ASYNC, DETACHED)
        for name in (ASYNC, COMPUTE, DETACHED):
            yield overhead(f"{case}, whole step with {name}", steps, name, NONE)


def _measure(blocks: int) -> tuple[Timings, Timings]:
    """On one rank: the seconds of the logs and of the whole steps, by kind of log, in blocks that take turns."""
    loss = MultiTaskLoss("bce_with_logits", [f"task{t}" for t in range(TASKS)])
    heads = DistributedDataParallel(nn.Linear(FEATURES, TASKS))
    logs: dict[str, list[float]] = {name: [] for name in (NONE, DETACHED, COMPUTE, ASYNC)}
    steps: dict[str, list[float]] = {name: [] for name in logs}
    for _ in range(blocks):
        for name in list(logs):
            for log_seconds, step_seconds in _block(heads, loss, _log(name, loss.train_metric)):
                logs[name].append(log_seconds)
                steps[name].append(step_seconds)
    return Timings(logs), Timings(steps)


def _block(heads: nn.Module, loss: MultiTaskLoss, log: Log) -> Iterator[tuple[float, float]]:
    """Some steps, without the first, which has nothing to read yet."""
    features, labels = torch.randn(ROWS, FEATURES), torch.randint(0, 2, (ROWS, TASKS))
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    is_slower = dist.get_rank() == dist.get_world_size() - 1
    loss.train_metric.reset()
    for step in range(6):
        with no_collector():
            started = time.perf_counter_ns()
            losses: Losses = loss(heads(features), labels)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            if is_slower:
                time.sleep(SLOWER_SECONDS)
            done = time.perf_counter_ns()
            log(losses)
            end = time.perf_counter_ns()
        if step:
            yield (end - done) * 1e-9, (end - started) * 1e-9


def _log(name: str, metric: GlobalLoss) -> Log:
    pending: list[PendingResult[Losses]] = []

    def compute(_: Losses) -> Losses:
        result = metric.compute()
        metric.reset()
        return result

    def compute_async(_: Losses) -> Losses | None:
        result = pending.pop().wait() if pending else None
        pending.append(metric.compute_async())
        metric.reset()
        return result

    kinds: dict[str, Log] = {
        NONE: lambda _: None,
        DETACHED: lambda losses: {key: get_global_loss_detached(value) for key, value in losses.items()},
        COMPUTE: compute,
        ASYNC: compute_async,
    }
    return kinds[name]
