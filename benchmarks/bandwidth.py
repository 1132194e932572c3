"""bandwidth: on a GPU, how much of the memory's speed a step reaches, eager and compiled.

A step has to read logits, labels and weights and to write the logits' gradient: those bytes, over the step's time, are
its bandwidth. The device's own is that of a large copy, read and written. Not part of a run on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.counts import count_launches
from benchmarks.paired import take_turns
from benchmarks.rivals import PLAIN, copy_of_the_bytes, plain
from benchmarks.row import Row, as_much, counted
from benchmarks.workload import FUSED, OURS, Setting, make_loss, make_workload, step_of, tracked_step

__all__ = ["bandwidth"]

COPY, COMPILED = "large copy", "twloss, compiled"


def bandwidth(setting: Setting) -> Iterator[Row]:
    """Achieved memory bandwidth of a step, forward + backward + tracking, against that of a large copy."""
    work = make_workload(*((65536, 8) if setting.quick else (1048576, 32)), setting.device)
    steps = {
        OURS: tracked_step(work),
        FUSED: tracked_step(work, fused=True),
        COMPILED: step_of(torch.compile(make_loss(work), fullgraph=True), work),
        PLAIN: plain(work),
    }
    timings = take_turns({**steps, COPY: copy_of_the_bytes(work)}, setting.device, setting.effort)
    elements = work.logits.numel() * work.logits.element_size()
    peak = 3 * elements / timings.median_us(COPY) / 1e3
    for name, step in steps.items():
        achieved = 4 * elements / timings.median_us(name) / 1e3
        yield as_much(f"{work.size}, {name}", "GB/s", achieved, rival=COPY, theirs=peak, timed=True)
        if setting.device.type == "cuda":
            yield counted(f"{work.size}, {name}", "launches", count_launches(step))
