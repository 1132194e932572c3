"""Wrong arguments, one a line: what takes one raises a TypeError or ValueError that names it, and does nothing else."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.refusals import EITHER, HUGE, WrongError, expect_refusal
from twloss import (
    GlobalLoss,
    Loss,
    MultiTaskLoss,
    RankingQuality,
    build_loss,
    build_multi_task_loss,
    get_global_loss_detached,
)

TASKS = ["like", "reply"]
TWO = torch.ones(2)
BOOL, COMPLEX, META = torch.ones(2) > 0, torch.ones(2) + 0j, torch.ones(2, device="meta")

# argument, value, error, what came, what was expected; tried with everything that takes an argument of the name.
ARGUMENTS: list[tuple[str, Any, WrongError, str, str]] = [
    ("loss_type", "bce", ValueError, "'bce'", "one of ['bce_with_logits', 'cross_entropy', 'given'] or a callable"),
    ("loss_type", None, TypeError, "NoneType", "a LossType, its name or a callable"),
    ("loss_type", ["cross_entropy"], TypeError, "list", "a LossType, its name or a callable"),
    ("loss_type", nn.BCEWithLogitsLoss, TypeError, "", "expected"),
    ("tasks", "like", TypeError, "str", "a sequence of names"),
    ("tasks", {"like"}, TypeError, "set", "a sequence of names"),
    ("tasks", {"like": 1.0}, TypeError, "dict", "a sequence of names"),
    ("tasks", iter(TASKS), TypeError, "list_iterator", "a sequence of names"),
    ("tasks", np.array(TASKS), TypeError, "ndarray", "a sequence of names"),
    ("tasks", 2, TypeError, "int", "a sequence of names"),
    ("tasks", b"like", TypeError, "a name of type int", "str"),
    ("tasks", ["like", None], TypeError, "a name of type NoneType", "str"),
    ("tasks", [["like"]], TypeError, "a name of type list", "str"),
    ("tasks", (), ValueError, "[]", "one or more names"),
    ("tasks", ["like", ""], ValueError, "['like', '']", "not empty"),
    ("tasks", ["like", "like"], ValueError, "['like', 'like']", "each once"),
    *[
        (name, *row)
        for name in ("reduction", "task_loss_reduction")
        for row in [
            ("none", ValueError, "'none'", "one of ['mean', 'sum']"),
            ("max", ValueError, "'max'", "one of ['mean', 'sum']"),
            ("Mean", ValueError, "'Mean'", "one of ['mean', 'sum']"),
            (None, TypeError, "NoneType", "one of ['mean', 'sum']"),
            (torch.mean, TypeError, "builtin_function_or_method", "one of ['mean', 'sum']"),
        ]
    ],
    ("global_reduction", "prod", ValueError, "'prod'", "one of ['mean', 'sum', 'min', 'max', 'median']"),
    ("global_reduction", ["mean"], TypeError, "list", "one of ['mean', 'sum', 'min', 'max', 'median']"),
    ("global_reduction", None, TypeError, "NoneType", "one of ['mean', 'sum', 'min', 'max', 'median']"),
    *[
        (name, *row)
        for name in ("pos_weights", "task_weights", "logit_shift")
        for row in [
            ([1.0, 2.0, 3.0], ValueError, "3 values", "2, one for each of ['like', 'reply']"),
            ([1.0, math.nan], ValueError, "nan", "a finite number"),
            (math.inf, ValueError, "inf", "a finite number"),
            ([HUGE, 1], EITHER, "", "expected"),
            ("ab", TypeError, "str", "a number"),
            (b"ab", TypeError, "", "expected"),
            (True, TypeError, "bool", "a number"),
            ([1.0, None], TypeError, "NoneType", "a number"),
            ([[1.0], [2.0]], TypeError, "list", "a number"),
            ({1.0, 2.0}, TypeError, "set", "a number"),
            (np.ones(2), TypeError, "ndarray", "a number"),
            ({"like": 1.0}, ValueError, "the tasks ['like']", "['like', 'reply']"),
            ({"like": 1.0, "repost": 2.0}, ValueError, "the tasks ['like', 'repost']", "['like', 'reply']"),
            ({"like": 1.0, "reply": "2"}, TypeError, "str", "a number"),
            (torch.ones(1, 2), ValueError, "torch.float32 of shape (1, 2)", "(2,) numbers"),
            (BOOL, ValueError, "torch.bool of shape (2,)", "(2,) numbers"),
            (COMPLEX, TypeError, "torch.complex64", "a real dtype"),
            (META, EITHER, "", "expected"),
            (TWO.to_sparse(), EITHER, "", "expected"),
        ]
    ],
    ("pos_weights", [1.0, -1.0], ValueError, "(1.0, -1.0)", "numbers >= 0"),
    ("pos_weight", -1.0, ValueError, "(-1.0,)", "numbers >= 0"),
    ("pos_weight", "2", TypeError, "str", "a number"),
    ("pos_weight", TWO, ValueError, "2 values", "1"),
    ("mean_over", "tasks", ValueError, "'tasks'", "one of ['rows', 'weights']"),
    ("mean_over", None, TypeError, "NoneType", "one of ['rows', 'weights']"),
    ("ignore_index", "-1", TypeError, "str", "a number or None"),
    ("ignore_index", True, TypeError, "bool", "a number or None"),
    ("ignore_index", [-1], TypeError, "list", "a number or None"),
    ("ignore_index", -1j, TypeError, "complex", "a number or None"),
    ("ignore_index", torch.tensor(-1), TypeError, "Tensor", "a number or None"),
    ("ignore_index", HUGE, EITHER, "", "expected"),
    ("global_batch", 1, TypeError, "int", "a bool"),
    ("global_batch", "yes", TypeError, "str", "a bool"),
    ("segments", ["x"], TypeError, "list", "a mapping such as"),
    ("segments", "x", TypeError, "str", "a mapping such as"),
    ("segments", {}, ValueError, "an empty mapping", "one or more dimensions, or None"),
    ("segments", {1: 2}, TypeError, "a dimension of type int", "str"),
    ("segments", {"": 2}, ValueError, "a dimension without a name", "not empty"),
    ("segments['x']", {"x": 0}, ValueError, "0", "at least one id"),
    ("segments['x']", {"x": -1}, ValueError, "-1", "at least one id"),
    ("segments['x']", {"x": True}, TypeError, "bool", "names or a number of ids"),
    ("segments['x']", {"x": 2.0}, TypeError, "float", "names or a number of ids"),
    ("segments['x']", {"x": None}, TypeError, "NoneType", "names or a number of ids"),
    ("segments['x']", {"x": "DE"}, TypeError, "str", "names or a number of ids"),
    ("segments['x']", {"x": {"DE"}}, TypeError, "set", "names or a number of ids"),
    ("segments['x']", {"x": TWO}, TypeError, "Tensor", "names or a number of ids"),
    ("segments['x']", {"x": ["DE", 1]}, TypeError, "a name of type int", "str"),
    ("segments['x']", {"x": []}, ValueError, "[]", "one or more names"),
    ("segments['x']", {"y": 1, "x": ["DE", ""]}, ValueError, "['DE', '']", "not empty"),
    ("segments['x']", {"x": ["DE", "DE"]}, ValueError, "['DE', 'DE'] with ['DE'] more than once", "each once"),
    (
        "segments['x']",
        {"x": ["DE", "other"]},
        ValueError,
        "['DE', 'other'] with ['other']",
        'without a name are "other"',
    ),
    ("segments", {"x": 2**27}, ValueError, "134,217,729 cells", "at most 134,217,728"),
    ("segments", {"x": HUGE}, ValueError, "1", "at most 134,217,728"),
    ("segments", {"x": ["y=z"], "x=y": ["z"]}, ValueError, "{'x': ", "no two equal keys: ['x=y=z'"),
    ("segments", {"x": ["y=other"], "x=y": 1}, ValueError, "{'x': ", "no two equal keys: ['x=y=other'"),
    ("fused", 1, TypeError, "int", "a bool"),
    ("fused", None, TypeError, "NoneType", "a bool"),
    ("nan_strategy", "impute", ValueError, "'impute'", "one of ['warn', 'error', 'ignore', 'disable']"),
    ("nan_strategy", None, TypeError, "NoneType", "one of ['warn', 'error', 'ignore', 'disable']"),
    ("nan_strategy", 0.0, TypeError, "float", "one of ['warn', 'error', 'ignore', 'disable']"),
    ("window", 0, ValueError, "0", "at least one update"),
    ("window", -1, ValueError, "-1", "at least one update"),
    ("window", 1.5, TypeError, "float", "a number of updates or None"),
    ("window", math.nan, TypeError, "float", "a number of updates or None"),
    ("window", True, TypeError, "bool", "a number of updates or None"),
    ("window", False, TypeError, "bool", "a number of updates or None"),
    ("window", "5", TypeError, "str", "a number of updates or None"),
    ("window", [5], TypeError, "list", "a number of updates or None"),
    ("window", torch.tensor(5), TypeError, "Tensor", "a number of updates or None"),
    ("window_rows", 0, ValueError, "0", "at least one row"),
    ("window_rows", 1e6, TypeError, "float", "a number of rows or None"),
    ("window_rows", True, TypeError, "bool", "a number of rows or None"),
    ("compute_with_cache", True, ValueError, "True", "False"),
    ("process_group", "gloo", TypeError, "", "expected"),
    ("process_group", 3, TypeError, "", "expected"),
    ("process_group", [0, 1], TypeError, "list", "a ProcessGroup, a 1-D DeviceMesh or None"),
    ("local_loss", 4.0, TypeError, "float", "a Tensor"),
    ("local_loss", None, TypeError, "NoneType", "a Tensor"),
    ("local_loss", np.ones(2), TypeError, "ndarray", "a Tensor"),
    ("local_loss", [TWO], TypeError, "list", "a Tensor"),
    ("local_loss", torch.tensor(4), TypeError, "torch.int64", "a floating dtype"),
    ("local_loss", torch.tensor(True), TypeError, "torch.bool", "a floating dtype"),
    ("local_loss", COMPLEX, TypeError, "torch.complex64", "a floating dtype"),
    ("local_loss", {}, ValueError, "[]", "expected"),
    ("local_loss['b']", {"a": TWO, "b": None}, TypeError, "NoneType", "a Tensor"),
    ("local_loss['b']", {"a": TWO, "b": {"c": TWO}}, TypeError, "dict", "a Tensor"),
    ("local_loss['b']", {"a": TWO, "b": BOOL}, TypeError, "torch.bool", "a floating dtype"),
    ("local_loss", {"a": TWO, "b": META}, ValueError, "['cpu', 'meta']", "tensors of one device"),
    ("weight", "1", TypeError, "str", "a Tensor or a number"),
    ("weight", True, TypeError, "bool", "a Tensor or a number"),
    ("weight", [1.0, 1.0], TypeError, "list", "a Tensor or a number"),
    ("weight", 1j, TypeError, "complex", "a Tensor or a number"),
    ("weight", np.ones(2), TypeError, "ndarray", "a Tensor or a number"),
    ("weight", HUGE, EITHER, "", "expected"),
    ("weight", torch.ones(3), ValueError, "shape (3,)", "broadcasts to (2,)"),
    ("weight", COMPLEX, TypeError, "torch.complex64", "a real dtype"),
    ("weight", META, ValueError, "a tensor on meta", "cpu"),
    ("weight", {"a": 1.0}, ValueError, "the keys ['a']", "a number, a Tensor or the keys of local_loss"),
]

TAKERS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "Loss": (Loss, {"loss_type": "bce_with_logits"}),
    "MultiTaskLoss": (MultiTaskLoss, {"loss_type": "bce_with_logits", "tasks": TASKS}),
    "GlobalLoss": (GlobalLoss, {"tasks": TASKS}),
    "RankingQuality": (RankingQuality, {"tasks": TASKS}),
    "build_loss": (build_loss, {"loss_type": "bce_with_logits"}),
    "build_multi_task_loss": (build_multi_task_loss, {"loss_type": "bce_with_logits", "tasks": TASKS}),
    "get_global_loss_detached": (get_global_loss_detached, {"local_loss": TWO}),
}
KEYWORDS = dict.fromkeys(("GlobalLoss", "RankingQuality"), ("process_group", "compute_with_cache"))
"""What goes through **kwargs."""


def takers(argument: str) -> list[str]:
    """Everything that takes an argument of the name."""
    return [
        name
        for name, (function, _) in TAKERS.items()
        if argument.partition("[")[0] in inspect.signature(function).parameters or argument in KEYWORDS.get(name, ())
    ]


@pytest.mark.parametrize(
    ("taker", "argument", "value", "error", "came", "expected"),
    [
        pytest.param(taker, *row, id=f"{taker} {row[0]}={row[3] or type(row[1]).__name__}")
        for row in ARGUMENTS
        for taker in takers(row[0])
    ],
)
def test_a_wrong_argument(taker: str, argument: str, value: Any, error: WrongError, came: str, expected: str) -> None:
    function, good = TAKERS[taker]
    kwargs = {**good, argument.partition("[")[0]: value}
    expect_refusal(lambda: function(**kwargs), error, f"{argument}: got {came}", expected, kwargs)


# what takes the arguments, the arguments, error, how the message starts, what was expected.
DETACHED, ENTROPY, SQUARED = "get_global_loss_detached", {"loss_type": "cross_entropy"}, {"loss_type": F.mse_loss}
TOGETHER: list[tuple[str, dict[str, Any], WrongError, str, str]] = [
    ("Loss", {**ENTROPY, "pos_weight": 2.0}, ValueError, "pos_weight: got one with", "BCE_WITH_LOGITS only"),
    ("Loss", {**SQUARED, "pos_weight": 2.0}, ValueError, "pos_weight: got one with", "BCE_WITH_LOGITS only"),
    ("MultiTaskLoss", {**ENTROPY, "pos_weights": 2.0}, ValueError, "pos_weights: got one with", "BCE_WITH_LOGITS only"),
    ("MultiTaskLoss", {**SQUARED, "pos_weights": 2.0}, ValueError, "pos_weights: got one with", "BCE_WITH_LOGITS only"),
    ("GlobalLoss", {"tasks": None, "task_weights": [1.0, 2.0]}, ValueError, "task_weights: got 2 values", "1"),
    *[
        (
            taker,
            {"tasks": ["x=0", "y/x=1", "y"], "segments": {"x": 2}},
            ValueError,
            "segments: got {'x': 2}",
            "no two equal keys: ['x=0', 'y/x=1']",
        )
        for taker in ("MultiTaskLoss", "GlobalLoss", "RankingQuality")
    ],
    (
        "MultiTaskLoss",
        {"segments": {"x": 2}, "quality": RankingQuality(TASKS, segments={"x": 3})},
        ValueError,
        "quality: got one with segments={'x': 3}",
        "expected None or {'x': 2}, as the loss has",
    ),
    (
        "Loss",
        {"quality": RankingQuality(None, segments={"x": 3})},
        ValueError,
        "quality: got one with segments={'x': 3}",
        "expected None, as the loss has",
    ),
    (DETACHED, {"weight": 1.0, "reduction": "sum"}, ValueError, "weight: got one with reduction='sum'", "none"),
    (DETACHED, {"weight": math.nan}, ValueError, "weight: got nan", "finite"),
    (DETACHED, {"weight": math.inf}, ValueError, "weight: got inf", "finite"),
    (DETACHED, {"weight": torch.ones(3, 2)}, ValueError, "weight: got shape (3, 2)", "broadcasts to (2,)"),
    (DETACHED, {"local_loss": {"a": TWO}, "weight": {"b": 1.0}}, ValueError, "weight: got the keys ['b']", "the keys"),
    (DETACHED, {"local_loss": {"a": TWO}, "weight": {"a": "1"}}, TypeError, "weight['a']: got str", "a number"),
    (DETACHED, {"local_loss": {"a": TWO}, "weight": {"a": None}}, TypeError, "weight['a']: got NoneType", "a number"),
    (DETACHED, {"local_loss": TWO.to_sparse(), "weight": 1.0}, EITHER, "local_loss: got", "expected"),
]


@pytest.mark.parametrize(
    ("taker", "kwargs", "error", "starts", "expected"),
    [pytest.param(*row, id=f"{row[0]} {row[3]}") for row in TOGETHER],
)
def test_wrong_arguments_together(
    taker: str, kwargs: dict[str, Any], error: WrongError, starts: str, expected: str
) -> None:
    function, good = TAKERS[taker]
    kwargs = {**good, **kwargs}
    expect_refusal(lambda: function(**kwargs), error, starts, expected, kwargs)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dist_sync_on_step", "yes"), ("sync_on_compute", 1), ("compute_on_cpu", "x"), ("dist_sync_fn", 3), ("sync", 1)],
)
@pytest.mark.parametrize("metric", [GlobalLoss, RankingQuality])
def test_a_wrong_argument_of_torchmetrics_own(metric: Callable[..., object], argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{argument}`"):
        metric(TASKS, **{argument: value})


@pytest.mark.parametrize("unknown", ["pos_weights", "mean_over", "windows", "quality"])
@pytest.mark.parametrize("metric", [GlobalLoss, RankingQuality])
def test_an_unknown_argument_is_named(metric: Callable[..., object], unknown: str) -> None:
    with pytest.raises(ValueError, match=unknown):
        metric(TASKS, **{unknown: 1})


# Arguments that a loss does not have: which loss, the argument, what is meant.
LIKELY = [
    ("Loss", "pos_weights", "pos_weight"),
    ("Loss", "task_loss_reduction", "reduction"),
    ("Loss", "global_reduction", "reduction, which is over rows: a single task has no other"),
    ("Loss", "tasks", "a MultiTaskLoss, which takes it"),
    ("Loss", "task_weights", "a MultiTaskLoss, which takes it"),
    ("Loss", "weight", "weights of rows in forward, or pos_weight"),
    ("Loss", "weights", "weights of rows in forward, or pos_weight"),
    ("Loss", "ignore_label", "ignore_index"),
    ("MultiTaskLoss", "pos_weight", "pos_weights"),
    ("MultiTaskLoss", "reduction", "task_loss_reduction, over rows, or global_reduction, over tasks"),
    ("MultiTaskLoss", "weight", "weights of rows in forward, task_weights or pos_weights"),
    ("MultiTaskLoss", "weights", "weights of rows in forward, task_weights or pos_weights"),
    ("MultiTaskLoss", "task_loss_reductions", "task_loss_reduction"),
]


@pytest.mark.parametrize(("taker", "argument", "meant"), LIKELY)
def test_an_argument_that_a_loss_does_not_have_is_refused_with_the_one_that_is_meant(
    taker: str, argument: str, meant: str
) -> None:
    function, good = TAKERS[taker]
    with pytest.raises(TypeError) as caught:
        function(**good, **{argument: "mean"})
    assert str(caught.value).startswith(f"{argument}: got an argument that {taker} does not have, expected {meant}")


@pytest.mark.parametrize("loss", [Loss, MultiTaskLoss])
def test_an_argument_that_is_like_no_other_is_named(loss: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'xyz'"):
        loss("bce_with_logits", xyz=1)


class OfHeads(MultiTaskLoss):
    """A loss of a user's own, with arguments of its own."""

    def __init__(self, weights: float, **options: Any) -> None:
        super().__init__("bce_with_logits", TASKS, task_weights=weights, **options)


class OfAName(MultiTaskLoss):
    """One with the constructor of ours."""


def test_a_subclass_has_the_arguments_that_it_has() -> None:
    assert OfHeads(weights=2.0, mean_over="weights").task_weights == (2.0, 2.0)
    assert copy.deepcopy(OfHeads(weights=2.0)).task_weights == (2.0, 2.0)
    wrong: dict[str, Any] = {"pos_weight": 2.0}
    with pytest.raises(TypeError, match=r"\bunexpected keyword argument 'pos_weight'"):
        OfHeads(1.0, **wrong)
    with pytest.raises(TypeError, match=r"^pos_weight: .* that OfAName does not have, expected pos_weights$"):
        OfAName("bce_with_logits", TASKS, **wrong)
