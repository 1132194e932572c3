"""compile: torch.compile of the whole loss, fullgraph: graphs, recompiles, and the time of a compiled step.

The compiler's back end is wrapped to count what reaches it: a graph break or a recompile is one more graph. The full
run compiles with inductor; the quick one with "aot_eager", which traces the same graphs and generates no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from benchmarks.paired import take_turns
from benchmarks.rivals import PLAIN, plain
from benchmarks.row import Row, counted, exactly, overhead, speedup
from benchmarks.workload import OURS, Setting, Workload, make_loss, make_workload, step_of, tracked_step

__all__ = ["compile_cost"]

STEPS = 20
EAGER = "twloss, eager"
COMPILED_PLAIN = f"{PLAIN}, compiled"
HEADLINES = {4096: "compiled model, 4,096 × 10, weighted, against compiled plain BCE"}


def compile_cost(setting: Setting) -> Iterator[Row]:
    """Graphs and recompiles of a compiled step over 20 steps, and its time against what is eager or untracked."""
    name = "aot_eager" if setting.quick else "inductor"
    for rows, tasks in ((4096, 10),) if setting.quick else ((4096, 10), (65536, 10)):
        torch.compiler.reset()
        work = make_workload(rows, tasks, setting.device)
        backend = _Counted(name)
        step = step_of(torch.compile(make_loss(work), backend=backend, fullgraph=True), work)
        step()
        graphs = backend.graphs
        for _ in range(STEPS):
            step()
        case = f"{work.size}, {name}"
        yield counted(f"{case}, first step", "graphs", graphs, exactly(1))
        yield counted(f"{case}, {STEPS} more steps", "recompiles", backend.graphs - graphs, exactly(0))
        untracked = step_of(torch.compile(_plain_losses(work), backend=name, fullgraph=True), work)
        steps = {OURS: step, EAGER: tracked_step(work), COMPILED_PLAIN: untracked, PLAIN: plain(work)}
        timings = take_turns(steps, setting.device, setting.effort)
        yield speedup(case, timings, OURS, EAGER)
        yield overhead(case, timings, OURS, COMPILED_PLAIN, headline=HEADLINES.get(rows, ""))
        yield overhead(case, timings, OURS, PLAIN)


def _plain_losses(work: Workload) -> Callable[..., dict[str, Tensor]]:
    """One BCE call that tracks nothing, as a function that can be compiled."""

    def losses(logits: Tensor, labels: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        loss = F.binary_cross_entropy_with_logits(
            logits, labels, weights, pos_weight=work.pos_weights, reduction="none"
        )
        return {"loss": loss.mean(0).mean()}

    return losses


class _Counted:
    """A back end of torch.compile that counts its graphs."""

    def __init__(self, name: str) -> None:
        self.compile: Callable[..., Any] = lookup_backend(name)
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return self.compile(module, inputs)
