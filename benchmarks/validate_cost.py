"""validate_cost: what ``validate_args=True`` adds to a step that is tracked without it."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.option_cost import option_cost
from benchmarks.row import Row, at_most
from benchmarks.workload import Setting

__all__ = ["validate_cost"]

GOALS = {False: at_most(1.7), True: at_most(1.3)}
"""At 4,096 rows, by whether the step is fused."""


def validate_cost(setting: Setting) -> Iterator[Row]:
    """The tracked step that counts invalid labels and negative weights, against the one that does not."""
    return option_cost(setting, "validate_args", lambda _, fused: GOALS[fused])
