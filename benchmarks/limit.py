"""limit: how far the forward pass, tracking included, is from what no implementation can do without.

Two floors: one pass of exp and one of log1p over the same elements, and a copy that moves the bytes of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paired import take_turns
from benchmarks.rivals import copy_of_the_bytes, exp_and_log1p
from benchmarks.row import Row, at_most, overhead
from benchmarks.workload import FUSED, OURS, Setting, kind_of, make_workload, tracked_forward

__all__ = ["limit"]

SIZES = ((4096, 10), (65536, 10))
GOALS = {(65536, 10): at_most(2.8)}
"""Of the fused pass with weights and pos_weights."""
TRANSCENDENTALS = "exp + log1p of the logits"
BYTES = "copy of as many bytes"


def limit(setting: Setting) -> Iterator[Row]:
    """The forward pass, tracking included, against exp + log1p and against moving the inputs' bytes."""
    for weighted in (True, False):
        for rows, tasks in SIZES:
            work = make_workload(rows, tasks, setting.device, weighted=weighted)
            ours = {OURS: tracked_forward(work), FUSED: tracked_forward(work, fused=True)}
            floors = {TRANSCENDENTALS: exp_and_log1p(work), BYTES: copy_of_the_bytes(work)}
            timings = take_turns({**ours, **floors}, setting.device, setting.effort)
            case = f"{work.size}, {kind_of(weighted=weighted)}"
            for floor in floors:
                yield overhead(case, timings, OURS, floor)
            yield overhead(
                f"{case}, fused", timings, FUSED, TRANSCENDENTALS, GOALS.get((rows, tasks)) if weighted else None
            )
            yield overhead(f"{case}, fused", timings, FUSED, BYTES)
