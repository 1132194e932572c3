"""The back end of ``torch.compile`` where nobody names one: "aot_eager", in this process and on the ranks.

What a compiled pass means does not depend on who generates its code. "aot_eager" traces the same graphs, forward and
backward, and runs them by torch's own kernels: half a second a graph, where inductor takes three to ten. The tests of
``tests/losses/test_inductor.py`` have the code itself generated, by the fixture ``inductor``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from twloss._rows import compiled, row_pass

__all__ = ["AOT_EAGER", "FEWEST_ROWS", "by_inductor", "inductor", "use"]

AOT_EAGER, INDUCTOR = "aot_eager", "inductor"

# Tests have small batches, which would not be compiled.
FEWEST_ROWS, row_pass._FEWEST_ROWS = row_pass._FEWEST_ROWS, 2


def use(backend: str) -> None:
    """Make it the default of torch.compile, whoever calls that; Lightning, once imported, has wrapped it."""
    defaults = inspect.unwrap(torch.compile).__kwdefaults__
    assert defaults is not None
    defaults["backend"] = backend


@contextmanager
def inductor() -> Iterator[None]:
    """Inside this context passes are compiled by inductor, also those that aot_eager has compiled before."""
    compiled._compiled.cache_clear()
    use(INDUCTOR)
    try:
        yield
    finally:
        use(AOT_EAGER)
        compiled._compiled.cache_clear()


def by_inductor(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    """A rank's function with generated code, for ``RankPool.run``."""
    with inductor():
        return function(rank, *args)
