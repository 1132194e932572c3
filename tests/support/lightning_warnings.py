"""What Lightning warns of in runs as short as those of the tests, and is no error there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lightnings_own_warnings() -> Iterator[None]:
    """Filters for what Lightning warns of in a run as short as this."""
    with warnings.catch_warnings():
        for message in (
            r".*isinstance\(treespec, LeafSpec\).* is deprecated",
            ".*does not have many workers",
        ):
            warnings.filterwarnings("ignore", message)
        yield
