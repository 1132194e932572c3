"""The oracle of ranking quality: every key from all rows at once, in Python floats and loops.

It imports nothing of the package, nor of torch. Sums are ``math.fsum``, which rounds once, and the background entropy
is ``H = (P·log1p(N/P) + N·log1p(P/N)) / (P + N)`` of the positive and negative weight: log(p) as log1p of a ratio of
sums, so that a base rate near 0 or 1 costs no digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from tests.support import reference

QUANTITIES = ("ne", "rce", "calibration", "ctr", "logloss", "weight")
Impression = tuple[float, float, float]
"""Logit, label and weight."""


def quality(rows: Iterable[Impression]) -> dict[str, float]:
    """The six numbers of a task's rows; NaN where nothing was measured."""
    rows = [row for row in rows if row[2] != 0]
    weight = math.fsum(w for _, _, w in rows)
    if not weight:
        return {**dict.fromkeys(QUANTITIES, math.nan), "weight": 0.0}
    positive = math.fsum(w * y for _, y, w in rows)
    negative = math.fsum(w * (1.0 - y) for _, y, w in rows)
    logloss = math.fsum(w * reference.bce_with_logits(x, y) for x, y, w in rows) / weight
    predicted = math.fsum(w * reference.sigmoid(x) for x, _, w in rows)
    background = entropy(positive, negative)
    ne = logloss / background if background else math.nan
    return {
        "ne": ne,
        "rce": 100.0 * (1.0 - ne),
        "calibration": predicted / positive if positive else math.inf,
        "ctr": positive / weight,
        "logloss": logloss,
        "weight": weight,
    }


def entropy(positive: float, negative: float) -> float:
    """Of the base rate positive / (positive + negative), in nats."""
    if not (positive and negative):
        return 0.0
    bits = positive * math.log1p(negative / positive), negative * math.log1p(positive / negative)
    return math.fsum(bits) / (positive + negative)


def result(columns: Mapping[str, Sequence[Impression]]) -> dict[str, float]:
    """``{"ne/<task>": …}``, by quantity and then by task."""
    by_task = {task: quality(rows) for task, rows in columns.items()}
    return {f"{name}/{task}": by_task[task][name] for name in QUANTITIES for task in by_task}


def close(found: Mapping[str, float], expected: Mapping[str, float], tolerance: float) -> bool:
    """Whether all keys agree, in their order, to a relative tolerance; NaN and infinity where expected.

    rce is a difference from 100: its error is relative to 100·ne, of which it is made, and to 100.
    """
    return list(found) == list(expected) and all(
        _close(found[key], expected[key], tolerance, 200.0 if "rce" in key.partition("/")[0] else 0.0)
        for key in expected
    )


def _close(found: float, expected: float, tolerance: float, scale: float) -> bool:
    if math.isnan(expected) or math.isinf(expected):
        return found == expected or (math.isnan(found) and math.isnan(expected))
    return abs(found - expected) <= tolerance * (abs(expected) + scale)
