"""A result that may wait for other ranks: a sum over ranks, and what a metric's ``compute_async()`` gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
Other = TypeVar("Other")


def collective_error(call: str, error: RuntimeError, advice: str = "") -> RuntimeError:
    """The error of a call whose collective failed: what has to be done on every rank, and what the backend said."""
    return RuntimeError(
        f"{call}: the collective failed; every rank has to call it, equally often and in the same order{advice}. "
        f"The backend's error: {error}"
    )


class Works:
    """Several collectives as one that is under way.

    Args:
        works: these.
    """

    def __init__(self, works: Sequence[dist.Work | Works]) -> None:
        self._works = works

    def is_completed(self) -> bool:
        """Whether all of them are done."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Wait for all of them; a RuntimeError if one fails."""
        for work in self._works:
            work.wait()


class PendingResult(Generic[Result]):
    """The result of ``compute()`` at the moment at which it was started, whatever became of the metric since.

    One that is never waited for does no harm.

    Args:
        work: the collective that is under way; None: there is none.
        finish: makes the result, once the collective is done.
        call: the call that started the collective, for the error if it fails.

    Examples:
        >>> import torch
        >>> from twloss import GlobalLoss
        >>> metric = GlobalLoss(["like"])
        >>> metric.update(loss_sum=torch.tensor([30.0]), weight=100)
        >>> pending = metric.compute_async()
        >>> metric.reset()
        >>> pending.wait()["loss/like"]
        tensor(0.3000, dtype=torch.float64)
    """

    def __init__(self, work: dist.Work | Works | None, finish: Callable[[], Result], call: str = "") -> None:
        self._work = work
        self._finish = finish
        self._call = call

    def is_completed(self) -> bool:
        """True if wait() returns at once, also after a failed collective."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> Result:
        """The result, once it is there; the same at each call.

        Raises:
            RuntimeError: from the backend's, if a rank is gone or the time is out, and what ``compute()`` raises.
        """
        if not hasattr(self, "_result"):
            if self._work is not None:
                try:
                    self._work.wait()
                except RuntimeError as error:
                    raise collective_error(self._call, error) from error
            self._result = self._finish()
        return self._result

    def map(self, function: Callable[[Result], Other]) -> PendingResult[Other]:
        """A function of the result, called when that is waited for."""
        return PendingResult(self._work, lambda: function(self.wait()), self._call)

    @staticmethod
    def join(pending: Sequence[PendingResult[Other]], call: str) -> PendingResult[list[Other]]:
        """The results of several, started by one call, in their order."""
        works = [each._work for each in pending if each._work is not None]
        return PendingResult(Works(works) if works else None, lambda: [each.wait() for each in pending], call)
