"""The tables that stand for products of options: any two values meet, in few rows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.pairwise import pairwise

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
