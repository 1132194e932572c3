"""Tables in which any two values of two options meet, in place of a product in which all of them do.

A product of four options with four values each is 256 tests, of which 16 have every pair. What three settings of a loss
do only together is for the property tests, which draw them at random.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

__all__ = ["pairwise"]

Pairs = set[tuple[tuple[int, int], ...]]


def pairwise(*fixtures: str, **options: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrise a test by these options, whose values may have names; some may be fixtures, which take the value.

    Each row is the combination that covers most of the pairs not yet covered; of several, the one whose values were
    used least.
    """
    values = [
        each if isinstance(each, Mapping) else {text_of(value): value for value in each} for each in options.values()
    ]
    names = [list(each) for each in values]
    product = list(itertools.product(*(range(len(each)) for each in names)))
    left: Pairs = set().union(*map(pairs_of, product))
    table, used = [], Counter[tuple[int, int]]()
    while left:
        row = max(product, key=lambda row: (len(pairs_of(row) & left), -sum(used[each] for each in enumerate(row))))
        left -= pairs_of(row)
        used.update(enumerate(row))
        chosen = [names[option][place] for option, place in enumerate(row)]
        parameters = [each[name] for each, name in zip(values, chosen)]
        table.append(pytest.param(*parameters, id="-".join(filter(None, chosen))))
    return pytest.mark.parametrize(tuple(options), table, indirect=fixtures)


def pairs_of(places: tuple[int, ...]) -> Pairs:
    """Each two of a row's values, by the option and the place among its values."""
    return set(itertools.combinations(enumerate(places), 2))


def text_of(value: Any) -> str:
    """The name of a value that was given none."""
    return getattr(value, "__name__", None) or str(value)
