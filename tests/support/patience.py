"""How long the tests wait for another process before they call that a failure.

It only ends what hangs: far longer than anything takes, beside six busy programs on two cores too. What a test asserts
of time is a ratio, a count or an order, never seconds. Whoever is to be seen running out of time gets a limit of its
own, which no work has to be done within.
"""

from __future__ import annotations

from datetime import timedelta

__all__ = ["PATIENCE", "SECONDS"]

SECONDS = 600.0
PATIENCE = timedelta(seconds=SECONDS)
"""The same, as torch.distributed takes it."""
