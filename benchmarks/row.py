"""One comparison: what was measured, of whom, against whom, and whether the goal was met.

Benchmarks yield rows; the tables, the JSON, the chart and the exit status are all made of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.paired import Timings, paired_ratio

__all__ = [
    "Goal",
    "Row",
    "as_much",
    "at_least",
    "at_most",
    "counted",
    "exactly",
    "in_words",
    "number",
    "overhead",
    "quartiles_in_words",
    "shown",
    "speedup",
    "times_as_long",
]

FASTER, SLOWER, AS_LONG = "× faster", "× slower", "× as long"

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {"≥": operator.ge, "≤": operator.le, "=": operator.eq}


@dataclass(frozen=True)
class Goal:
    """A bound on what is measured."""

    sign: str
    """"≥", "≤" or "="."""
    bound: float

    def is_met(self, measured: float) -> bool:
        """Whether ``measured`` keeps to the bound."""
        return _COMPARISONS[self.sign](measured, self.bound)

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


def at_least(bound: float) -> Goal:
    """The goal ``≥ bound``."""
    return Goal("≥", bound)


def at_most(bound: float) -> Goal:
    """The goal ``≤ bound``."""
    return Goal("≤", bound)


def exactly(bound: float) -> Goal:
    """The goal ``= bound``."""
    return Goal("=", bound)


@dataclass(frozen=True)
class Row:
    """One comparison of a benchmark."""

    case: str
    """The size, or whatever else was varied."""
    rival: str
    """Against whom; empty where there is nobody."""
    ours: float
    theirs: float | None
    unit: str
    """Of ``ours`` and ``theirs``."""
    measured: float
    """What the goal is about: a ratio, or ``ours`` itself."""
    measured_unit: str
    spread: tuple[float, float] | None
    """The interquartile range of ``measured``; None for what does not vary."""
    goal: Goal | None
    timed: bool
    """Whether it depends on the clock, and so on the machine's load."""
    headline: str = ""
    """What is compared, in words of its own, for the summary and the chart; empty for a row that is in neither."""

    def is_met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        return None if self.goal is None else self.goal.is_met(self.measured)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        goal = None if self.goal is None else str(self.goal)
        return {**vars(self), "spread": self.spread and list(self.spread), "goal": goal, "met": self.is_met()}


def speedup(case: str, timings: Timings, ours: str, rival: str, goal: Goal | None = None, *, headline: str = "") -> Row:
    """How many times as long the rival takes: rival ÷ ours, paired."""
    times = timings.median_us(ours), timings.median_us(rival)
    ratio = paired_ratio(timings, rival, ours)
    return Row(case, rival, *times, "µs", ratio.median, FASTER, ratio.quartiles, goal, timed=True, headline=headline)


def overhead(
    case: str, timings: Timings, ours: str, rival: str, goal: Goal | None = None, *, headline: str = ""
) -> Row:
    """How many times as long ours takes: ours ÷ rival, paired."""
    times = timings.median_us(ours), timings.median_us(rival)
    ratio = paired_ratio(timings, ours, rival)
    return Row(case, rival, *times, "µs", ratio.median, AS_LONG, ratio.quartiles, goal, timed=True, headline=headline)


def counted(
    case: str,
    unit: str,
    ours: float,
    goal: Goal | None = None,
    *,
    rival: str = "",
    theirs: float | None = None,
    timed: bool = False,
) -> Row:
    """A figure with a goal for itself; the rival's is beside it."""
    return Row(case, rival, ours, theirs, unit, ours, unit, None, goal, timed)


def as_much(
    case: str, unit: str, ours: float, goal: Goal | None = None, *, rival: str, theirs: float, timed: bool = False
) -> Row:
    """A figure with a goal for ours ÷ rival."""
    return Row(case, rival, ours, theirs, unit, ours / theirs, "× as much", None, goal, timed)


_DIGITS = {
    "× as much": ".3f",
    "µs": ",.0f",
    "MiB": ",.2f",
    "GB/s": ",.1f",
    "s": ",.1f",
    "ns a row and task": ",.2f",
    "log-log slope": ".3f",
    "relative error": ".1e",
}


def number(value: float, unit: str) -> str:
    """A value without its unit, in the digits that the unit deserves."""
    return f"{value:{_DIGITS.get(unit, '.2f' if unit.startswith('×') else ',g')}}"


def shown(value: float, unit: str) -> str:
    """A value with its unit."""
    return f"{number(value, unit)}{'' if unit.startswith('×') else ' '}{unit}"


def in_words(row: Row) -> str:
    """The figure in words: a speed-up below 1 is a slowdown."""
    unit, (measured,) = _as_said(row, row.measured)
    return shown(measured, unit)


def quartiles_in_words(row: Row) -> str:
    """The quartiles of what was measured, in the unit of ``in_words``; empty for what does not vary."""
    if row.spread is None:
        return ""
    unit, spread = _as_said(row, *row.spread)
    return " – ".join(number(value, unit) for value in sorted(spread))


def times_as_long(row: Row) -> float:
    """How many times as long as the rival ours takes, of a row that ``speedup`` or ``overhead`` made."""
    return 1 / row.measured if row.measured_unit == FASTER else row.measured


def _as_said(row: Row, *values: float) -> tuple[str, list[float]]:
    if row.measured_unit == FASTER and row.measured < 1:
        return SLOWER, [1 / value for value in values]
    return row.measured_unit, list(values)
