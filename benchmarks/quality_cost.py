"""quality_cost: what ``quality=True`` adds to a step that is tracked without it."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.option_cost import option_cost
from benchmarks.row import Row, at_most
from benchmarks.workload import Setting

__all__ = ["quality_cost"]

GOALS = {True: (at_most(2.1), at_most(1.35)), False: (at_most(1.45), at_most(1.15))}
"""At 4,096 rows, of the eager and of the fused step, by whether there are weights and pos_weights.

Both sums of the fused step come from one pass, those of single kernels from two.
"""


def quality_cost(setting: Setting) -> Iterator[Row]:
    """The tracked step with normalised entropy and calibration, quality=True, against the one without."""
    return option_cost(setting, "quality", lambda weighted, fused: GOALS[weighted][fused])
