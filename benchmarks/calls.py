"""calls: how far one call wanders through the package, counted by ``sys.setprofile`` after a first, uncounted call.

A call is an event "call" of a frame whose code lies in ``twloss``, the demo left out: functions, methods and
properties, and also comprehensions, and generators each time that they are entered again, so that a generator
expression over the tasks counts once a task and once more for its end. That is why the number of tasks is fixed here,
and why Python from 3.12 on, which runs list, set and dict comprehensions without a frame, counts fewer. Returns don't
count, nor do frames of torch, torchmetrics (``nn.Module.__call__`` is one) or the standard library. A change of file is
a pair of consecutive calls that lie in different files of the package.

Alone: ``python -m benchmarks.calls``; with ``--show`` the calls themselves, file:function, indented by depth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

import twloss
from benchmarks.row import Row, at_most, counted, shown
from benchmarks.workload import Setting, Workload, make_loss, make_workload

__all__ = ["calls"]

PACKAGE = Path(twloss.__file__).parent
DEMO = PACKAGE / "demo"
ROWS, TASKS = 256, 3
FORWARD, FUSED, QUALITY, COMPUTE = "forward", "forward, fused", "forward, quality=True", "compute() of train_metric"
MIXED = "forward, three loss types in mappings, quality=True"
GOALS = {FORWARD: (26, 10, 14), FUSED: (26, 10, 14), QUALITY: (42, 11, 20), MIXED: (150, 16, 60), COMPUTE: (16, 6, 8)}


class Call(NamedTuple):
    """One call of a function of the package."""

    depth: int
    """How many of the package's own calls it is made within."""
    file: str
    function: str


def calls(setting: Setting) -> Iterator[Row]:
    """The package's own Python calls in one call of it, their files and changes of file."""
    for name, call in _cases(setting.device).items():
        trace = trace_calls(call)
        files = [made.file for made in trace]
        counts = len(trace), len(set(files)), sum(before != after for before, after in pairwise(files))
        for unit, count, bound in zip(("calls", "files", "changes of file"), counts, GOALS[name]):
            yield counted(f"{TASKS} tasks, weights, pos_weights, {name}", unit, count, at_most(bound))


def trace_calls(call: Callable[[], object]) -> list[Call]:
    """The calls of the package's functions within ``call``, in their order, when it is called a second time."""
    trace: list[Call] = []
    depth = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        path = Path(frame.f_code.co_filename)
        if PACKAGE not in path.parents or DEMO in path.parents:
            return
        if event == "call":
            trace.append(Call(depth, path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name))
            depth += 1
        elif event == "return":  # after an exception and at a generator's yield too
            depth -= 1

    call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return trace


def _cases(device: torch.device) -> dict[str, Callable[[], object]]:
    """What is called, by name, on one process."""
    work = make_workload(ROWS, TASKS, device)
    loss, fused, with_quality = make_loss(work), make_loss(work, fused=True), make_loss(work, quality=True)
    return {
        FORWARD: lambda: loss(work.logits, work.labels, work.weights),
        FUSED: lambda: fused(work.logits, work.labels, work.weights),
        QUALITY: lambda: with_quality(work.logits, work.labels, work.weights),
        MIXED: _forward_of_three_types(work),
        COMPUTE: loss.train_metric.compute,
    }


def _forward_of_three_types(work: Workload) -> Callable[[], object]:
    """A forward of a binary task, one of classes and one of a callable, each with weights."""
    huber = nn.HuberLoss(reduction="none")
    types: dict[str, Any] = {"like": "bce_with_logits", "stars": "cross_entropy", "seconds": huber}
    loss = twloss.MultiTaskLoss(types, list(types), quality=True)
    ones = torch.ones(ROWS, device=work.logits.device)
    logits = {"like": work.logits[:, 0], "stars": work.logits[:, :3], "seconds": work.logits[:, 1]}
    labels = {"like": ones, "stars": ones.long(), "seconds": ones}
    weights = dict.fromkeys(types, ones)
    return lambda: loss(logits, labels, weights)


def main() -> int:
    """Print the figures, or the calls themselves; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=calls.__doc__)
    parser.add_argument("--show", action="store_true", help="print the calls, file:function, indented by depth")
    setting = Setting(torch.device("cpu"), quick=True)
    if parser.parse_args().show:
        for name, call in _cases(setting.device).items():
            print(
                f"# {name}",
                *("  " * depth + f"{file}:{function}" for depth, file, function in trace_calls(call)),
                sep="\n",
            )
        return 0
    rows = list(calls(setting))
    for row in rows:
        print(f"{row.case}: {shown(row.ours, row.unit)}, goal {row.as_json()['goal']}, met: {row.is_met()}")
    return 0 if all(row.is_met() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
