"""Timing that a noisy machine harms least: the rivals take turns, and each round is compared with itself.

A round runs a block of calls of every step, A B C, the next one in the opposite order, C B A, and so on. What is
reported are medians over rounds of the time a call and of the ratios within a round, with their interquartile range: a
slow spell of the machine hits both sides of a ratio. Each block begins with an untimed call, the garbage collector is
off in it, and it ends when the device has finished.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Effort", "Spread", "Step", "Timings", "no_collector", "paired_ratio", "spread_of", "take_turns"]

Step = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure one case."""

    block_s: float
    """The least time a block of calls takes."""
    case_s: float
    """About how long all rounds of a case may take."""
    rounds: tuple[int, int]
    """The least and the greatest number of rounds."""


FULL = Effort(block_s=5e-3, case_s=10.0, rounds=(7, 61))
QUICK = Effort(block_s=5e-4, case_s=0.3, rounds=(3, 5))


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Timings:
    """Seconds a call, a list with one number a round, for each step by name."""

    seconds: Mapping[str, list[float]]

    def median_us(self, name: str) -> float:
        """Microseconds a call."""
        return statistics.median(self.seconds[name]) * 1e6

    def rounds(self) -> Iterator[dict[str, float]]:
        """Each round's seconds a call."""
        for seconds in zip(*self.seconds.values()):
            yield dict(zip(self.seconds, seconds))


def paired_ratio(timings: Timings, numerator: str, denominator: str) -> Spread:
    """The ratio of two steps' times within a round, over all rounds."""
    return spread_of([seconds[numerator] / seconds[denominator] for seconds in timings.rounds()])


def spread_of(values: list[float]) -> Spread:
    """The median of values and their quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, (low, high))


def take_turns(steps: Mapping[str, Step], device: torch.device, effort: Effort) -> Timings:
    """Time steps that do comparable work, in turns."""
    calls = {name: _calls_for(step, device, effort.block_s) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    started = time.perf_counter()
    least, most = effort.rounds
    for done in range(most):
        for name in order:
            seconds[name].append(_block(steps[name], calls[name], device))
        order.reverse()
        if done + 1 >= least and time.perf_counter() - started > effort.case_s:
            break
    return Timings(seconds)


def _calls_for(step: Step, device: torch.device, block_s: float) -> int:
    """How many calls make a block; warms up on the way."""
    return max(1, math.ceil(block_s / _block(step, 1, device)))


def _block(step: Step, calls: int, device: torch.device) -> float:
    """Seconds a call."""
    with no_collector():
        # Once more untimed: the step before left its own data in the caches.
        step()
        _finish(device)
        started = time.perf_counter_ns()
        for _ in range(calls):
            step()
        _finish(device)
        return (time.perf_counter_ns() - started) * 1e-9 / calls


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep the garbage collector out of what is timed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
