"""What every refused call has in common: an error that names the argument, and nothing that has changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor

from twloss import GlobalLoss, Loss, MultiTaskLoss

WrongError = type[Exception] | tuple[type[Exception], ...]
EITHER: WrongError = (TypeError, ValueError)
HUGE = 10**400
"""A number that no float can hold."""


def expect_refusal(call: Callable[[], object], error: WrongError, starts: str, expected: str, given: Any) -> None:
    """The error says what came and what was expected, and what was given is as it was."""
    before = snapshot(given)
    with pytest.raises(error, match="^" + re.escape(starts)) as caught:
        call()
    message = str(caught.value)
    assert "expected" in message
    assert expected in message.removeprefix(starts)
    assert snapshot(given) == before


def expect_error_that_names(
    arguments: str, call: Callable[..., object], loss: Loss | MultiTaskLoss | GlobalLoss, given: dict[str, Any]
) -> None:
    """An error that starts with one of the names, separated by bars, after which all is as before."""
    before = sums_of(loss), snapshot(given)
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**given)
    assert re.match(rf"({arguments})\b", str(caught.value))
    assert (sums_of(loss), snapshot(given)) == before


def snapshot(value: Any) -> Any:
    """What an update in place of a tensor or a container would change."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, Mapping):
        return [(key, snapshot(item)) for key, item in value.items()]
    return [snapshot(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def sums_of(loss: Loss | MultiTaskLoss | GlobalLoss) -> list[list[list[float]]]:
    """The running sums."""
    metrics = [loss] if isinstance(loss, GlobalLoss) else [loss.train_metric, loss.eval_metric]
    return [metric.totals.tolist() for metric in metrics]


def expect_refused_batch(
    loss: Loss | MultiTaskLoss,
    good: dict[str, Any],
    wrong: dict[str, Any],
    error: WrongError,
    starts: str,
    expected: str,
) -> None:
    """Refused in both modes, after which the sums are those of before."""
    batch = {**good, **wrong}
    for mode in (True, False):
        loss.train(mode)
        before = sums_of(loss)
        expect_refusal(lambda: loss(**batch), error, starts, expected, batch)
        assert sums_of(loss) == before


def named(rows: list[Any]) -> list[Any]:
    """Parameters that are named by the start of the message."""
    return [pytest.param(*row, id=f"{index}: {row[-2]}") for index, row in enumerate(rows)]


def error_of(call: Callable[[], object]) -> str:
    """What a RuntimeError says; an empty string where there is none."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""
