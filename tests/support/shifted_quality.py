"""The oracle of a RankingQuality that shifts its logits: each row's logit plus its task's number, in Python floats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.support import quality_reference
from tests.support.quality_batches import TASKS, Rows, columns

SHIFT = (-2.25, 0.5, 3.0)


def expected_of_shifted(
    batches: Iterable[Rows],
    shift: Sequence[float] = SHIFT,
    tasks: Sequence[str] = TASKS,
    missing: float | None = None,
) -> dict[str, float]:
    """The result of all rows."""
    rows = columns(batches, tasks, missing)
    shifted = {task: [(x + by, y, w) for x, y, w in rows[task]] for task, by in zip(tasks, shift)}
    return quality_reference.result(shifted)
