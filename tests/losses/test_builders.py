"""The signatures that users know, when they warn, and the detached loss over ranks."""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import norm
from tests.support.rank_pool import RankPool
from twloss import (
    GlobalLoss,
    Loss,
    LossType,
    MultiTaskLoss,
    RankingQuality,
    build_loss,
    build_multi_task_loss,
    compute_all,
    compute_all_async,
)
from twloss import get_global_loss_detached as over_ranks

TASKS = ["like", "reply", "retweet"]
SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (build_loss, "(loss_type, reduction='mean')"),
    (
        build_multi_task_loss,
        "(loss_type, tasks, task_loss_reduction='mean', global_reduction='mean', pos_weights=None)",
    ),
    (over_ranks, "(local_loss, reduction='mean', *, weight=None, process_group=None)"),
    (
        Loss,
        "(loss_type, reduction='mean', *, pos_weight=None, mean_over='rows', ignore_index=None, global_batch=False, "
        "gradient_reduction='mean', process_group=None, quality=False, segments=None, validate_args=False, "
        "fused=False)",
    ),
    (
        MultiTaskLoss,
        "(loss_type, tasks, task_loss_reduction='mean', global_reduction='mean', pos_weights=None, *, "
        "task_weights=None, mean_over='rows', ignore_index=None, global_batch=False, "
        "gradient_reduction='mean', process_group=None, "
        "quality=False, segments=None, validate_args=False, fused=False)",
    ),
    (
        GlobalLoss,
        "(tasks, task_loss_reduction='mean', global_reduction='mean', *, task_weights=None, "
        "segments=None, validate_args=False, nan_strategy='warn', **kwargs)",
    ),
    (
        RankingQuality,
        "(tasks, *, ignore_index=None, window=None, window_rows=None, segments=None, logit_shift=None, "
        "validate_args=False, nan_strategy='warn', **kwargs)",
    ),
    (RankingQuality.update, "(self, logits, labels, weights=None, *, segments=None)"),
    (Loss.forward, "(self, logits, labels, weights=None, *, normalizer=None, segments=None)"),
    (MultiTaskLoss.forward, "(self, logits, labels, weights=None, *, normalizer=None, given=None, segments=None)"),
    (Loss.from_sums, "(self, loss_sum, weight, *, normalizer=None)"),
    (MultiTaskLoss.from_sums, "(self, loss_sum, weight, *, normalizer=None)"),
    (MultiTaskLoss.compute, "(self)"),
    (MultiTaskLoss.compute_async, "(self)"),
    (MultiTaskLoss.reset, "(self)"),
    (compute_all, "(metrics, *, reset=False)"),
    (compute_all_async, "(metrics, *, reset=False)"),
    (GlobalLoss.update, "(self, loss_sum, weight)"),
    (GlobalLoss.plot, "(self, val=None, ax=None, *, key=None)"),
]


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without the warning of reductions that are chosen on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call(*args, **kwargs)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels) ** 2


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=[f.__qualname__ for f, _ in SIGNATURES])
def test_names_order_and_defaults_are_the_contract(function: Callable[..., Any], expected: str) -> None:
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == expected


OF_ROWS = [each for each in LossType if each is not LossType.GIVEN]


@pytest.mark.parametrize("loss_type", [*OF_ROWS, "bce_with_logits", squared_error])
@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
def test_build_loss_builds_the_class(loss_type: Any, reduction: str | None) -> None:
    arguments = [loss_type] if reduction is None else [loss_type, reduction]
    built, made = quietly(build_loss, *arguments), quietly(Loss, *arguments)
    assert type(built) is Loss
    classes = loss_type is LossType.CROSS_ENTROPY
    logits, labels = torch.randn((7, 3) if classes else (7,)), torch.randint(0, 2, (7,))
    weights = torch.rand(7)
    assert torch.equal(built(logits, labels, weights), made(logits, labels, weights))
    if loss_type is LossType.BCE_WITH_LOGITS:
        exact = F.binary_cross_entropy_with_logits(logits, labels.float(), weights, reduction=reduction or "mean")
        assert built(logits, labels, weights).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("loss_type", [*OF_ROWS, "bce_with_logits", squared_error])
@pytest.mark.parametrize("arguments", [[], ["sum"], ["mean", "max"], ["sum", "median"], ["mean", norm]])
@pytest.mark.parametrize("pos_weights", [None, [0.5, 27.3, 4.0], {"reply": 1, "retweet": 2, "like": 3}])
def test_build_multi_task_loss_builds_the_class(loss_type: Any, arguments: list[Any], pos_weights: Any) -> None:
    if loss_type not in (LossType.BCE_WITH_LOGITS, "bce_with_logits"):
        pos_weights = None
    built = quietly(build_multi_task_loss, loss_type, TASKS, *arguments, pos_weights=pos_weights)
    made = quietly(MultiTaskLoss, loss_type, TASKS, *arguments, pos_weights=pos_weights)
    assert type(built) is MultiTaskLoss
    classes = loss_type is LossType.CROSS_ENTROPY
    logits, labels = torch.randn((7, 3, 5) if classes else (7, 3)), torch.randint(0, 2, (7, 3))
    weights = torch.rand(7, 3)
    result = built(logits, labels, weights)
    assert result == made(logits, labels, weights)
    assert list(result) == ["loss/like", "loss/reply", "loss/retweet", "loss"]


def test_pos_weights_are_the_fifth_positional_argument() -> None:
    built = build_multi_task_loss("bce_with_logits", ["like", "reply"], "mean", "mean", [2.0, 3.0])
    assert built(torch.zeros(1, 2), torch.ones(1, 2))["loss"].item() == pytest.approx(2.5 * math.log(2))


class Subclass(MultiTaskLoss):
    """A loss of the user's own, whose constructor is not the package's."""

    def __init__(self, *args: Any) -> None:
        super().__init__("bce_with_logits", TASKS, *args)


class Learned(nn.Module):
    """A reduction with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.zeros(len(TASKS)))

    def forward(self, losses: Tensor) -> Tensor:
        """Weigh them."""
        return (losses * self.scales.exp()).sum()


# What is constructed or called, and the reductions that it warns of.
WARNING: list[tuple[Callable[[], object], list[str]]] = [
    (lambda: Loss("bce_with_logits", "sum"), ["reduction='sum'"]),
    (lambda: build_loss("bce_with_logits", "sum"), ["reduction='sum'"]),
    (lambda: MultiTaskLoss("bce_with_logits", TASKS, "sum"), ["task_loss_reduction='sum'"]),
    (lambda: MultiTaskLoss("bce_with_logits", TASKS, "mean", "max"), ["global_reduction='max'"]),
    (lambda: MultiTaskLoss("bce_with_logits", TASKS, "sum", norm), ["task_loss_reduction='sum'"]),
    (lambda: build_multi_task_loss("bce_with_logits", TASKS, "sum", "median"), ["task_loss_reduction", "median"]),
    (lambda: Subclass("sum", "sum"), ["task_loss_reduction='sum'", "global_reduction='sum'"]),
    (lambda: over_ranks(torch.ones(()), "sum"), ["reduction='sum'"]),
    (lambda: over_ranks({"loss": torch.ones(())}, "sum"), ["reduction='sum'"]),
]


@pytest.mark.parametrize(("call", "named"), WARNING)
def test_a_reduction_that_is_not_a_mean_warns_once_each_time_at_the_callers_line(
    call: Callable[[], object], named: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    assert [warning.category for warning in caught] == [UserWarning] * 2
    for warning in caught:
        assert warning.filename == __file__
        assert "global_batch=True" in str(warning.message)
        assert all(name in str(warning.message) for name in named)


def line_here() -> int:
    """The caller's line."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_the_line_of_the_warning_is_that_of_the_call() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = line_here()
        build_multi_task_loss("bce_with_logits", TASKS, "sum")
    assert [warning.lineno for warning in caught] == [before + 1]


QUIET: dict[str, Callable[[], object]] = {
    "Loss of a mean": lambda: Loss("bce_with_logits"),
    "Loss of the global batch": lambda: Loss("bce_with_logits", "sum", global_batch=True),
    "MultiTaskLoss of means": lambda: MultiTaskLoss("bce_with_logits", TASKS, "mean", "mean"),
    "MultiTaskLoss of the global batch": lambda: MultiTaskLoss(
        "bce_with_logits", TASKS, "sum", "max", global_batch=True
    ),
    "builders": lambda: [build_loss("cross_entropy"), build_multi_task_loss("cross_entropy", TASKS)],
    "a callable in one process": lambda: MultiTaskLoss("bce_with_logits", TASKS, global_reduction=norm),
    "a learned reduction in one process": lambda: MultiTaskLoss("bce_with_logits", TASKS, "mean", Learned()),
    "GlobalLoss, which has no gradient": lambda: GlobalLoss(TASKS, "sum", "max"),
    "a detached mean": lambda: over_ranks(torch.ones(()), weight=3.0),
}


@pytest.mark.parametrize("call", QUIET.values(), ids=QUIET)
def test_nothing_is_warned_of_where_nothing_is_wrong(call: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def reductions_warned_of() -> list[tuple[str, str]]:
    """By each reduction that is no name, the warnings of a loss with it, and the files that they are of."""
    found = []
    for reduction in (norm, Learned()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            MultiTaskLoss("bce_with_logits", TASKS, global_reduction=reduction)
            MultiTaskLoss("bce_with_logits", TASKS, global_reduction=reduction, global_batch=True)
        found += [(str(warning.message), warning.filename) for warning in caught]
    return found


def expect_warnings_of_both(found: list[tuple[str, str]]) -> None:
    assert [file for _, file in found] == [__file__] * 2
    for (message, _), name in zip(found, ("function norm", "Learned")):
        assert re.match(rf"global_reduction=.*{name}", message)
        assert "global_batch=True" in message


@pytest.mark.parametrize(("world_size", "is_warned_of"), [("1", False), ("2", True), ("", False), ("many", False)])
def test_a_launcher_of_several_processes_is_what_a_callable_reduction_warns_by(
    monkeypatch: pytest.MonkeyPatch, world_size: str, is_warned_of: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    found = reductions_warned_of()
    if is_warned_of:
        expect_warnings_of_both(found)
    else:
        assert found == []


def reductions_warned_of_on(rank: int, world_size: str) -> list[tuple[str, str]]:
    with mock.patch.dict(os.environ, WORLD_SIZE=world_size):
        return reductions_warned_of()


def test_a_process_group_of_several_ranks_is_what_a_callable_reduction_warns_by(two_ranks: RankPool) -> None:
    for found in two_ranks.run(reductions_warned_of_on, "1"):
        expect_warnings_of_both(found)


def test_a_process_group_of_one_rank_is_no_reason_to_warn_of_a_callable() -> None:
    pool = RankPool(1)
    try:
        assert pool.run(reductions_warned_of_on, "2") == [[]]
    finally:
        pool.stop()
