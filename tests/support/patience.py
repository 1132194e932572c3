"""How long the tests wait for another process before they call that a failure.

It only ends what hangs: far longer than anything takes, beside six busy programs on two cores too. What a test asserts
of time is a ratio, a count or an order, never seconds. Only where a limit is to run out has a test one of its own.
"""

from __future__ import annotations

from datetime import timedelta

__all__ = ["PATIENCE", "SECONDS"]

SECONDS = 600.0
PATIENCE = timedelta(seconds=SECONDS)
"""The same, as torch.distributed takes it."""
