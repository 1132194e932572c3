"""The two tiers of the tests: what ``python -m pytest`` runs, and what ``-m exhaustive`` runs on top.

A property test belongs to both: a few examples in the first tier, and ten times as many in the second.
"""

from __future__ import annotations

import re

import hypothesis
import pytest

__all__ = [
    "EXHAUSTIVE",
    "choose_examples",
    "dozens",
    "is_asked_for",
    "is_exhaustive",
    "is_property",
    "rough_seconds",
    "tier_of",
]

QUICK, EXHAUSTIVE = "quick", "exhaustive"
EXAMPLES = {QUICK: 12, EXHAUSTIVE: 120}

# In seconds, of the fixtures that start or compile something.
COSTS = {
    "inductor": 5.0,
    "new_compiler": 0.5,
    "eager_and_fused": 0.2,
    "two_ranks": 0.1,
    "three_ranks": 0.1,
    "ranks": 0.1,
}

for name, count in EXAMPLES.items():
    hypothesis.settings.register_profile(
        name,
        max_examples=count,
        # Examples on ranks wait for other processes, so a single slow one says nothing; nor does any on a busy machine.
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
        derandomize=True,
        print_blob=True,
    )


def choose_examples(config: pytest.Config) -> None:
    """Take as many as the tier has that is asked for; to be called before a test is imported."""
    hypothesis.settings.load_profile(tier_of(config.option.markexpr))


def tier_of(expression: str) -> str:
    """The tier that the option -m asks for."""
    return EXHAUSTIVE if EXHAUSTIVE in re.sub(rf"\bnot\s+{EXHAUSTIVE}\b", "", expression) else QUICK


def is_exhaustive() -> bool:
    """Whether that tier is asked for."""
    return hypothesis.settings().max_examples == EXAMPLES[EXHAUSTIVE]


def dozens(count: int) -> hypothesis.settings:
    """So many dozens of examples in the first tier."""
    return hypothesis.settings(max_examples=count * hypothesis.settings().max_examples)


def is_property(item: pytest.Item) -> bool:
    """Whether hypothesis draws its examples."""
    return hypothesis.is_hypothesis_test(getattr(item, "obj", None))


def is_asked_for(item: pytest.Item) -> bool:
    """Whether a test is of the tier that is asked for."""
    return is_exhaustive() == (item.get_closest_marker(EXHAUSTIVE) is not None)


def rough_seconds(item: pytest.Item) -> float:
    """A guess at what a test takes, to begin with the files that take longest."""
    costs = [cost for fixture, cost in COSTS.items() if fixture in getattr(item, "fixturenames", ())]
    costs += [10.0] * (item.get_closest_marker(EXHAUSTIVE) is not None) + [2.0] * is_property(item)
    return sum(costs, 0.01)
