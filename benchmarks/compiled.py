"""compile: torch.compile of a whole model, fullgraph: graphs, recompiles, and the time of a compiled step.

The model is its loss alone, and what it returns is the global loss, as a model's training step does; beside it stands
one that returns the losses of all tasks too. The compiler's back end is wrapped to count what reaches it: a graph break
or a recompile is one more graph. The full run compiles with inductor; the quick one with "aot_eager", which traces the
same graphs and generates no code.
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
from benchmarks.row import Row, at_most, counted, exactly, overhead, speedup
from benchmarks.workload import OURS, Setting, Workload, kind_of, make_loss, make_workload, step_of, tracked_step
from twloss import MultiTaskLoss

__all__ = ["compile_cost"]

STEPS = 20
EAGER, ALL_LOSSES = "twloss, eager", "twloss, all tasks' losses returned"
COMPILED_PLAIN = f"{PLAIN}, compiled"
GOALS = {
    (4096, True): at_most(1.5),
    (4096, False): at_most(1.7),
    (65536, True): at_most(0.9),
    (65536, False): at_most(0.95),
}
"""By rows and whether there are weights and pos_weights."""
HEADLINES = {
    4096: "compiled model, 4,096 × 10, weighted, against compiled plain BCE",
    65536: "compiled model, 65,536 × 10, weighted, against compiled plain BCE",
}


def compile_cost(setting: Setting) -> Iterator[Row]:
    """Graphs and recompiles of a compiled step over 20 steps, and its time against what is eager or untracked."""
    name = "aot_eager" if setting.quick else "inductor"
    for rows, weighted in ((4096, True),) if setting.quick else GOALS:
        torch.compiler.reset()
        work = make_workload(rows, 10, setting.device, weighted=weighted)
        backend = _Counted(name)
        step = step_of(torch.compile(_global_loss(make_loss(work)), backend=backend, fullgraph=True), work)
        step()
        graphs = backend.graphs
        for _ in range(STEPS):
            step()
        case = f"{work.size}, {kind_of(weighted=weighted)}, {name}"
        yield counted(f"{case}, first step", "graphs", graphs, exactly(1))
        yield counted(f"{case}, {STEPS} more steps", "recompiles", backend.graphs - graphs, exactly(0))
        steps = {
            OURS: step,
            ALL_LOSSES: step_of(torch.compile(make_loss(work), backend=name, fullgraph=True), work),
            EAGER: tracked_step(work),
            COMPILED_PLAIN: step_of(torch.compile(_plain_losses(work), backend=name, fullgraph=True), work),
            PLAIN: plain(work),
        }
        timings = take_turns(steps, setting.device, setting.effort)
        yield speedup(case, timings, OURS, EAGER)
        headline = HEADLINES[rows] if weighted else ""
        yield overhead(case, timings, OURS, COMPILED_PLAIN, GOALS[rows, weighted], headline=headline)
        yield overhead(f"{case}, all tasks' losses returned", timings, ALL_LOSSES, COMPILED_PLAIN)
        yield overhead(case, timings, OURS, PLAIN)


def _global_loss(loss: MultiTaskLoss) -> Callable[..., dict[str, Tensor]]:
    """A model that returns the global loss alone."""
    return lambda *inputs: {"loss": loss(*inputs)["loss"]}


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
