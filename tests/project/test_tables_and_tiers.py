"""The tables that stand for products of options, in which any two values meet, and the tier that -m asks for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.pairwise import pairwise
from tests.support.tiers import tier_of

OPTIONS: dict[str, list[Any]] = {
    "a": [0, 1, 2, 3],
    "b": ["w", "x", "y", "z"],
    "c": [False, True],
    "d": [None, 1.0, 2.0],
}


def test_any_two_values_meet_in_few_rows() -> None:
    names, rows = pairwise(**OPTIONS).args
    assert names == tuple(OPTIONS)
    table = [row.values for row in rows]
    for (first, ours), (second, theirs) in itertools.combinations(enumerate(OPTIONS.values()), 2):
        assert {(row[first], row[second]) for row in table} == set(itertools.product(ours, theirs))
    assert len(table) <= 20  # of 96


@pairwise(number={"one": 1, "two": 2}, text=["a", "b"])
def test_the_values_are_those_of_their_names(number: int, text: str, request: pytest.FixtureRequest) -> None:
    assert request.node.callspec.id == f"{'one' if number == 1 else 'two'}-{text}"


@pytest.mark.parametrize(
    ("expression", "tier"),
    [
        *[("not exhaustive", "quick"), ("not  exhaustive", "quick"), ("", "quick")],
        *[("exhaustive", "exhaustive"), ("exhaustive or not exhaustive", "exhaustive")],
    ],
)
def test_the_tier_that_is_asked_for(expression: str, tier: str) -> None:
    assert tier_of(expression) == tier
