"""``from_sums`` and tasks of type GIVEN: losses of sums that a caller made are those of the rows that they are of."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from benchmarks.counts import CollectiveLog, KernelLog
from tests.support import reference
from tests.support.metrics import weights_of
from tests.support.rank_pool import RankPool
from tests.support.results import numbers
from twloss import Loss, LossType, MultiTaskLoss, _precision, build_loss, build_multi_task_loss

TASKS = ["a", "b"]
KEYS = ["loss/a", "loss/b", "loss"]
NAN = math.nan


def given_loss(*args: Any, **options: Any) -> MultiTaskLoss:
    """A loss of GIVEN tasks alone, without the warning of reductions that are chosen on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return MultiTaskLoss("given", TASKS, *args, **options)


def beside_rows(*args: Any, **options: Any) -> MultiTaskLoss:
    """A loss of two GIVEN tasks, and one with rows between them."""
    types: dict[str, Any] = {"a": LossType.GIVEN, "like": "bce_with_logits", "b": "given"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return MultiTaskLoss(types, list(types), *args, **options)


def with_rows(loss: MultiTaskLoss, given: Any, *, rows: int = 4, **options: Any) -> dict[str, Tensor]:
    """The losses of sums beside rows whose loss is log 2 each."""
    return loss(torch.zeros(rows, 1), torch.ones(rows, 1), given=given, **options)


# The value of a loss, in whatever form the sums come.

WEIGHTS: dict[str, Any] = {
    "(tasks,)": torch.tensor([4.0, 2.0]),
    "integers": torch.tensor([4, 2]),
    "unsigned": torch.tensor([4, 2], dtype=torch.uint16),
    "half": torch.tensor([4.0, 2.0], dtype=torch.bfloat16),
    "mapping": {"b": torch.tensor(2), "a": torch.tensor(4)},
    "mapping of numbers": {"b": 2, "a": 4.0},
    "mapping of both": {"b": torch.tensor(2.0, dtype=torch.float64), "a": 4},
    "mapping of a fraction": {"b": Fraction(2), "a": np.float32(4)},
}
SHARED: dict[str, Any] = {
    "number": 4,
    "float": 4.0,
    "fraction": Fraction(4),
    "numpy": np.int64(4),
    "0-dim": torch.tensor(4.0),
    "0-dim of integers": torch.tensor(4, dtype=torch.uint8),
}


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("weight", [*WEIGHTS, *SHARED])
def test_every_form_of_the_sums(weight: str, by_task: bool, over_rows: Any) -> None:
    loss = given_loss(over_rows)
    loss_sum: Any = torch.tensor([6.0, 1.0])
    if by_task:
        loss_sum = {"b": torch.tensor(1.0, dtype=torch.float16), "a": torch.tensor(6.0)}
    divisors = (1.0, 1.0) if over_rows == "sum" else (4.0, 2.0) if weight in WEIGHTS else (4.0, 4.0)
    values = [6.0 / divisors[0], 1.0 / divisors[1]]
    exact = dict(zip(KEYS, [*values, sum(values) / 2]))
    losses = loss.from_sums(loss_sum, {**WEIGHTS, **SHARED}[weight])
    assert list(losses) == KEYS
    assert numbers(losses) == exact
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert numbers(loss.train_metric.compute()) == exact


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize("weight", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_loss_of_one_task(weight: Any, over_rows: Any, shape: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss = Loss("given", over_rows)
    loss_sum = torch.full(shape, 6.0, requires_grad=True)
    result = loss.from_sums(loss_sum, weight)
    assert result.shape == ()
    assert result.item() == (6.0 if over_rows == "sum" else 1.5)
    (slope,) = torch.autograd.grad(result, loss_sum)
    assert slope.item() == (1.0 if over_rows == "sum" else 0.25)
    assert loss.train_metric.compute()["loss"].item() == result.item()
    normalized = Loss("given").from_sums(loss_sum, weight, normalizer=torch.tensor(12))
    assert normalized.item() == 0.5


DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.int8, torch.int64, torch.uint8, torch.uint16, torch.uint64, torch.bool),
)


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize("way", ["tensor", "0-dim weight", "mapping", "given"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_sums_and_of_weights(dtype: torch.dtype, way: str, over_rows: Any) -> None:
    for of_sums, of_weights, validate_args in itertools.product((dtype, torch.float32), (dtype, torch.int64), (0, 1)):
        loss = (beside_rows if way == "given" else given_loss)(over_rows, validate_args=bool(validate_args))
        sums, weight = torch.tensor([1, 0]).to(of_sums), torch.tensor([1, 1]).to(of_weights)
        by_task, weights = dict(zip(TASKS, sums)), dict(zip(TASKS, weight))
        if way == "given":
            losses = with_rows(loss, {task: (each, weights[task]) for task, each in by_task.items()})
        elif way == "mapping":
            losses = loss.from_sums(by_task, weights)
        else:
            losses = loss.from_sums(sums, weight if way == "tensor" else weight[0])
        assert (losses["loss/a"].item(), losses["loss/b"].item()) == (1.0, 0.0)
        expected = torch.float64 if of_sums == torch.float64 else torch.float32
        assert {each.dtype for each in losses.values()} == {expected}
        assert loss.train_metric.compute()["loss/a"].item() == 1.0


@pytest.mark.parametrize("way", ["tensor", "mapping", "given"])
def test_the_running_sums_are_exact_whatever_the_loss_is_rounded_to(way: str) -> None:
    """2^24 + 1 is no number of float32, and a sum of float16 would be infinite."""
    for sums, weight in (
        (torch.tensor([2**24 + 1, 7]), torch.tensor([2**24 + 3, 1])),
        (torch.tensor([60_000.0, 7.0], dtype=torch.float16), torch.tensor([60_000.0, 1.0], dtype=torch.float16)),
    ):
        loss = beside_rows("sum") if way == "given" else given_loss("sum")
        for _ in range(3):
            if way == "given":
                with_rows(loss, {task: (s, w) for task, s, w in zip(TASKS, sums, weight)})
            elif way == "mapping":
                loss.from_sums(dict(zip(TASKS, sums)), dict(zip(TASKS, weight)))
            else:
                loss.from_sums(sums, weight)
        result = numbers(loss.train_metric.compute())
        assert (result["loss/a"], result["loss/b"]) == (3.0 * sums[0].item(), 21.0)
        means = given_loss()
        means.from_sums(sums, weight)
        assert weights_of(means.train_metric) == weight.tolist()


def test_the_least_of_a_signed_weight_and_a_bool_are_data_of_a_sum() -> None:
    for weight in (torch.tensor([-128, 1], dtype=torch.int8), torch.tensor([True, True])):
        loss = given_loss("sum")
        for _ in range(2):
            assert loss.from_sums(torch.tensor([3.0, 4.0]), weight)["loss/a"].item() == 3.0
        assert numbers(loss.train_metric.compute()) == dict(zip(KEYS, (6.0, 8.0, 7.0)))
        other = beside_rows("sum")
        losses = with_rows(other, {task: (torch.tensor(3.0), w) for task, w in zip(TASKS, weight)})
        assert losses["loss/a"].item() == 3.0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_decides_which_metric_is_fed(training: bool) -> None:
    for loss in (given_loss(), MultiTaskLoss("bce_with_logits", TASKS, quality=True)):
        loss.train(training)
        loss.from_sums(torch.tensor([6.0, 1.0]), 2)
        fed, other = (loss.train_metric, loss.eval_metric)[:: 1 if training else -1]
        assert (fed.update_count, other.update_count) == (1, 0)
    assert loss.train_quality.update_count == loss.eval_quality.update_count == 0


def test_what_is_logged_at_once_and_started_anew() -> None:
    loss = beside_rows(quality=True)
    with_rows(loss, {"a": torch.tensor(6.0), "b": (torch.tensor(8.0), 4)})
    result = numbers(loss.compute())
    assert result["loss/a"] == 6.0
    assert result["loss/b"] == 2.0
    assert result["logloss/like"] == pytest.approx(math.log(2), rel=1e-6)
    assert "logloss/a" not in result
    loss.reset()
    assert not loss.train_metric.update_called


def test_the_builders_of_the_algorithm_ml_make_them_too() -> None:
    losses = build_multi_task_loss(LossType.GIVEN, TASKS).from_sums(torch.tensor([6.0, 1.0]), 2)
    assert [each.item() for each in losses.values()] == [3.0, 0.5, 1.75]
    assert build_loss(LossType.GIVEN).from_sums(torch.tensor(6.0), 2).item() == 3.0


# GIVEN tasks beside others.


def test_given_tasks_stand_in_the_tasks_order_and_have_no_column() -> None:
    loss = beside_rows(task_weights={"a": 2.0, "like": 3.0, "b": 5.0})
    losses = with_rows(loss, {"b": (torch.tensor(8.0), 4), "a": torch.tensor(6.0)})
    exact = {"loss/a": 6.0, "loss/like": math.log(2), "loss/b": 2.0, "loss": (12 + 3 * math.log(2) + 10) / 3}
    assert list(losses) == list(exact)
    for result in (losses, loss.train_metric.compute()):
        assert numbers(result) == pytest.approx(exact, rel=1e-6)
    assert weights_of(loss.train_metric) == [1.0, 4.0, 4.0]


def test_a_normalizer_has_all_tasks() -> None:
    loss = beside_rows(global_reduction="sum")
    given = {"a": torch.tensor(6.0), "b": (torch.tensor(8.0), 4)}
    losses = with_rows(loss, given, normalizer=torch.tensor([3.0, 8.0, 16.0]))
    values = [2.0, math.log(2) / 2, 0.5]
    assert [each.item() for each in losses.values()] == pytest.approx([*values, sum(values)], rel=1e-6)
    sums = torch.tensor([6.0, 4 * math.log(2), 8.0])
    again = loss.from_sums(sums, torch.tensor([1, 4, 4]), normalizer=torch.tensor([3.0, 8.0, 16.0]))
    assert numbers(again) == pytest.approx(numbers(losses), rel=1e-6)
    result = numbers(loss.train_metric.compute())
    assert [*result.values()] == pytest.approx([6.0, math.log(2), 2.0, 8.0 + math.log(2)], rel=1e-6)


@pytest.mark.parametrize("form", ["tensors", "mappings"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "median"])
def test_two_groups_of_rows_and_given_tasks(form: str, reduction: Any) -> None:
    """The tasks of the groups are neither together nor in their order."""
    names = ["g0", "x0", "y0", "g1", "x1"]
    types: Any = {"g0": "given", "x0": "bce_with_logits", "y0": torch.sub, "g1": "given", "x1": "bce_with_logits"}
    weights = {"g0": 2.0, "x0": 0.5, "y0": 3.0, "g1": 0.25, "x1": 7.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss = MultiTaskLoss(types, names, "mean", reduction, pos_weights={"x1": 4.0}, task_weights=weights)
    logits = torch.tensor([[0.5, -1.0, 2.0], [1.5, 3.0, -0.25]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    sums = torch.tensor([5.0, 9.0], dtype=torch.float64, requires_grad=True)
    x, y = logits.tolist(), labels.tolist()

    def binary(n: int, column: int, positive: float) -> reference.Row:
        arguments = x[n][column], y[n][column], positive
        return reference.Row(reference.bce_with_logits(*arguments), reference.bce_slope(*arguments))

    columns = {
        "g0": [reference.Row(5.0, 1.0)],
        "x0": [binary(n, 0, 1.0) for n in range(2)],
        "y0": [reference.Row(x[n][1] - y[n][1], 1.0) for n in range(2)],
        "g1": [reference.Row(9.0 / 4, 0.25, 4.0)],
        "x1": [binary(n, 2, 4.0) for n in range(2)],
    }
    rule = reference.Rule(global_reduction=reduction, mean_over="weights", task_weights=list(weights.values()))
    inputs: Any = (logits, labels)
    if form == "mappings":
        inputs = [{task: each[:, t] for t, task in enumerate(("x0", "y0", "x1"))} for each in inputs]
    losses = loss(*inputs, given={"g1": (sums[1], 4), "g0": sums[0]})
    assert list(losses) == [f"loss/{task}" for task in names] + ["loss"]
    exact = reference.losses(columns, rule)
    for result in (losses, loss.train_metric.compute()):
        assert numbers(result) == pytest.approx(exact, rel=1e-12)
    by_logits, by_sums = torch.autograd.grad(losses["loss"], (logits, sums))
    slopes = reference.gradients(columns, rule)
    assert by_sums.tolist() == pytest.approx([slopes["g0"][0], slopes["g1"][0]], rel=1e-12)
    for column, task in enumerate(("x0", "y0", "x1")):
        assert by_logits[:, column].tolist() == pytest.approx(slopes[task], rel=1e-12, abs=1e-15)


def test_an_empty_batch_beside_a_given_loss() -> None:
    loss = beside_rows()
    losses = with_rows(loss, {"a": torch.tensor(6.0), "b": (torch.tensor(0.0), 0)}, rows=0)
    assert numbers(losses) == {"loss/a": 6.0, "loss/like": 0.0, "loss/b": 0.0, "loss": 6.0}
    result = numbers(loss.train_metric.compute())
    assert result == pytest.approx({"loss/a": 6.0, "loss/like": NAN, "loss/b": NAN, "loss": 6.0}, nan_ok=True)


def test_a_fused_pass_beside_a_given_loss(new_compiler: None) -> None:
    logits = torch.randn(40, 1, dtype=torch.float64, requires_grad=True)
    leaf = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = MultiTaskLoss({"a": "given", "like": "bce_with_logits"}, ["a", "like"], fused=True)
    labels = torch.rand(40, 1, dtype=torch.float64)
    result = loss(logits, labels, given={"a": (2 * leaf, 4)})["loss"]
    pairs = list(zip(logits.flatten().tolist(), labels.flatten().tolist()))
    columns = {
        "a": [reference.Row(6.0 / 4, 2.0)] * 4,
        "like": [reference.Row(reference.bce_with_logits(x, y), reference.bce_slope(x, y)) for x, y in pairs],
    }
    assert result.item() == pytest.approx(reference.losses(columns, reference.Rule())["loss"], rel=1e-12)
    by_logits, by_leaf = torch.autograd.grad(result, (logits, leaf))
    assert by_logits.flatten().tolist() == pytest.approx(
        reference.gradients(columns, reference.Rule())["like"], rel=1e-12
    )
    assert by_leaf.item() == 0.25


# Gradients.


@pytest.mark.parametrize("way", ["from_sums", "given"])
@pytest.mark.parametrize("global_batch", [False, True])
def test_a_weight_gets_no_gradient(way: str, global_batch: bool) -> None:
    leaf = torch.tensor([4.0, 2.0], requires_grad=True)
    sums = torch.tensor([6.0, 1.0], requires_grad=True)
    loss = (given_loss if way == "from_sums" else beside_rows)(global_batch=global_batch)
    for weight in (2 * leaf, dict(zip(TASKS, 2 * leaf))):
        if way == "given":
            result = with_rows(loss, {task: (s, w) for task, s, w in zip(TASKS, sums, 2 * leaf)})["loss"]
        else:
            result = loss.from_sums(sums, weight)["loss"]
        by_sums, by_weight = torch.autograd.grad(result, (sums, leaf), allow_unused=True)
        assert by_weight is None
        share = 3 if way == "given" else 2
        assert by_sums.tolist() == pytest.approx([1 / (8 * share), 1 / (4 * share)])


def test_what_reaches_the_callers_loss_is_one_number_a_task() -> None:
    seen: list[Tensor] = []
    rows = torch.randn(5, 2, requires_grad=True)
    loss_sum = rows.square().sum(0)
    loss_sum.register_hook(seen.append)
    losses = given_loss(task_weights=[1.0, 3.0]).from_sums(loss_sum, 5)
    losses["loss"].backward()
    assert [each.tolist() for each in seen] == [pytest.approx([0.1, 0.3])]


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("way", ["from_sums", "given"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_task_of_weight_0_adds_nothing_whatever_its_sum(way: str, bad: float, reduction: Any) -> None:
    sums = torch.tensor([6.0, bad], requires_grad=True)
    if way == "given":
        loss = beside_rows("mean", reduction, task_weights=[1.0, 0.0, 0.0])
        result = with_rows(loss, dict(zip(TASKS, sums)))["loss"]
    else:
        loss = given_loss("mean", reduction, task_weights=[1.0, 0.0])
        result = loss.from_sums(sums, 1)["loss"]
    share = 1.0 if reduction == "sum" else 3.0 if way == "given" else 2.0
    assert result.item() == pytest.approx(6.0 / share)
    (found,) = torch.autograd.grad(result, sums)
    assert found.tolist() == [pytest.approx(1 / share), 0.0]


@pytest.mark.parametrize("way", ["from_sums", "given"])
def test_a_task_without_data_keeps_its_head_in_the_graph(way: str) -> None:
    """DDP must not see an unused parameter."""
    sums = torch.tensor([6.0, 5.0], requires_grad=True)
    if way == "given":
        losses = with_rows(beside_rows(), {"a": (sums[0], 2), "b": (sums[1], 0)})
    else:
        losses = given_loss().from_sums(sums, torch.tensor([2, 0]))
    assert losses["loss/b"].item() == 0.0
    assert losses["loss/b"].requires_grad
    (found,) = torch.autograd.grad(losses["loss"], sums)
    assert found.tolist() == [pytest.approx(1 / 4 if way == "given" else 1 / 2), 0.0]


@pytest.mark.parametrize("weight", [4, torch.tensor([4.0, 4.0])])
@pytest.mark.parametrize("over_rows", ["mean", "sum"])
def test_second_derivatives(over_rows: Any, weight: Any) -> None:
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    result = given_loss(over_rows, "sum").from_sums(x**3, weight)["loss"]
    (slope,) = torch.autograd.grad(result, x, create_graph=True)
    (found,) = torch.autograd.grad(slope.sum(), x)
    divisor = 4 if over_rows == "mean" else 1
    assert found.tolist() == pytest.approx([6 * 2 / divisor, 6 * 3 / divisor], rel=1e-12)


@pytest.mark.parametrize("one_task", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_changed_in_place_leaves_the_callers_sums_alone(one_task: bool, dtype: torch.dtype) -> None:
    loss_sum = torch.full((1 if one_task else 2,), 6.0, dtype=dtype)
    if one_task:
        result: Any = Loss("given", "sum", global_batch=True).from_sums(loss_sum, 4)
    else:
        result = given_loss("sum").from_sums(loss_sum, 4)["loss/a"]
    result += 1
    assert set(loss_sum.tolist()) == {6.0}
    loss_sum.zero_()
    assert result.item() == 7.0


# What is not finite, negative or refused.


@pytest.mark.parametrize("way", ["from_sums", "given"])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_sum_that_is_not_finite_stays_so_while_it_is_left_out(way: str, bad: float) -> None:
    for strategy in ("warn", "ignore", "error", "disable"):
        loss = given_loss() if way == "from_sums" else beside_rows()
        loss.train_metric.nan_strategy = strategy
        for value in (6.0, bad):
            sums = dict(zip(TASKS, torch.tensor([value, 1.0])))
            losses = loss.from_sums(sums, 2) if way == "from_sums" else with_rows(loss, sums)
        assert not losses["loss/a"].isfinite()
        assert losses["loss/b"].isfinite()
        if strategy == "error":
            with pytest.raises(RuntimeError, match="not finite"):
                loss.train_metric.compute()
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = numbers(loss.train_metric.compute())
        assert ["not finite: a: 1" in str(each.message) for each in caught] == [True] * (strategy == "warn")
        if strategy == "disable":
            assert not math.isfinite(result["loss/a"])
        else:
            assert result["loss/a"] == (3.0 if way == "from_sums" else 6.0)
        assert result["loss/b"] == (0.5 if way == "from_sums" else 1.0)


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize("way", ["from_sums", "mapping", "number", "given"])
def test_negative_weights_are_counted_where_arguments_are_validated(way: str, over_rows: Any) -> None:
    sums = torch.tensor([6.0, 1.0])
    loss = (beside_rows if way == "given" else given_loss)(over_rows, validate_args=True)
    for weight in (torch.tensor([4.0, -2.0]), torch.tensor([4.0, 3.0]), torch.tensor([4.0, -1.0])):
        by_task = dict(zip(TASKS, zip(sums, weight)))
        if way == "given":
            with_rows(loss, by_task)
        elif way == "number":
            loss.from_sums(sums, weight[1].item())
        else:
            loss.from_sums(sums, weight if way == "from_sums" else {task: w for task, (_, w) in by_task.items()})
    told = "a: 2, b: 2" if way == "number" else "b: 2"
    with pytest.warns(UserWarning, match=f"negative weights: {told}$"):
        loss.train_metric.compute()


@pytest.mark.parametrize("loss", [given_loss(), MultiTaskLoss({"a": "given", "b": "given"}, TASKS), Loss("given")])
def test_given_tasks_alone_have_no_forward(loss: Any) -> None:
    batches: list[tuple[Any, ...]] = [(torch.zeros(3, 2), torch.ones(3, 2)), (None, None), ({}, {})]
    for batch in batches:
        with pytest.raises(ValueError, match=r"loss_type: got GIVEN alone.*expected a call of from_sums\(\)"):
            loss(*batch)
    assert not loss.train_metric.update_called


def test_between_sync_and_unsync_nothing_is_lost() -> None:
    loss = given_loss()
    loss.from_sums(torch.tensor([6.0, 1.0]), 2)
    loss.train_metric.sync(distributed_available=lambda: True, dist_sync_fn=lambda values, **_: [values])
    with pytest.raises(TorchMetricsUserError, match="between sync"):
        loss.from_sums(torch.tensor([6.0, 1.0]), 2)
    loss.train_metric.unsync()
    assert loss.train_metric.update_count == 1


# What it costs.


WAYS = ("(tasks,)", "(tasks,) and a number", "mappings", "given")


def step(loss: MultiTaskLoss, way: str, sums: Tensor, weight: Tensor) -> Tensor:
    """The global loss of sums, handed over in one of the ways."""
    names = [task for task in loss.tasks if task != "like"]
    if way == "given":
        logits = torch.zeros(4, 1, device=sums.device)
        return loss(logits, logits, given={t: (s, w) for t, s, w in zip(names, sums, weight)})["loss"]
    if way == "mappings":
        return loss.from_sums(dict(zip(names, sums)), dict(zip(names, weight)))["loss"]
    return loss.from_sums(sums, 4 if "number" in way else weight)["loss"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"global_reduction": "max", "validate_args": True}, {"global_batch": True}])
def test_no_value_is_waited_for(way: str, options: dict[str, Any]) -> None:
    loss = (beside_rows if way == "given" else given_loss)(**options)
    sums = torch.tensor([6.0, 1.0], requires_grad=True)
    with KernelLog() as log:
        step(loss, way, sums, torch.tensor([4.0, 2.0])).backward()
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in log.names)
    meta = step(copy.deepcopy(loss).to("meta"), way, torch.ones(2, device="meta"), torch.ones(2, device="meta"))
    assert meta.is_meta


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("over_rows", ["mean", "sum"])
@pytest.mark.parametrize("validate_args", [False, True])
def test_the_number_of_kernels_does_not_depend_on_the_number_of_tasks(
    way: str, over_rows: Any, validate_args: bool
) -> None:
    found = []
    for tasks in (2, 50):
        names = [f"task{t}" for t in range(tasks)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loss = MultiTaskLoss("given", names, over_rows, task_weights=[2.0] * tasks, validate_args=validate_args)
        sums, weight = torch.ones(tasks, requires_grad=True), torch.ones(tasks)
        step(loss, way, sums, weight)
        with KernelLog() as log:
            step(loss, way, sums, weight).backward()
        found.append(log.names)
    assert found[0] == found[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_device_without_float64(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)
    loss = (beside_rows if way == "given" else given_loss)(global_batch=True, validate_args=True)
    sums, weight = torch.tensor([2.0**24, 1.0], requires_grad=True), torch.tensor([4.0, 4.0])
    with KernelLog() as log:
        for value in (sums, torch.ones(2)):
            step(loss, way, value, weight)
    assert not any("float64" in name for name in log.names)
    assert loss.train_metric.totals.dtype == torch.float32
    assert loss.train_metric.compute()["loss/a"].item() == (2**24 + 1) / 8


def test_bare_losses_and_numbers_on_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)
    loss = beside_rows()
    losses = with_rows(loss, {"a": torch.tensor(2), "b": (torch.tensor(3.0), 4)})
    assert {each.dtype for each in losses.values()} == {torch.float32}
    assert loss.train_metric.compute()["loss/b"].item() == 0.75


# A model's life.


def test_the_first_batch_brings_the_order_of_the_tasks_from_the_meta_device() -> None:
    with torch.device("meta"):
        loss = beside_rows(task_weights=[1.0, 2.0, 3.0])
    given = {"a": torch.tensor(6.0), "b": (torch.tensor(8.0), 4)}
    exact = [6.0, math.log(2), 2.0, (6 + 2 * math.log(2) + 6) / 3]
    for _ in range(2):
        assert [each.item() for each in with_rows(loss, given).values()] == pytest.approx(exact, rel=1e-6)
        assert [*numbers(loss.train_metric.compute()).values()] == pytest.approx(exact, rel=1e-6)
        loss.to("meta")
        loss.to_empty(device="cpu")
        assert loss.train_metric.update_count == 0


@pytest.mark.parametrize("make", [given_loss, beside_rows])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_alone(make: Any, duplicate: Any) -> None:
    loss = make(task_weights=[2.0] * (2 if make is given_loss else 3), global_batch=True)
    way = "given" if make is beside_rows else "mappings"
    value = step(loss, way, torch.tensor([6.0, 1.0]), torch.tensor([4.0, 2.0]))
    twin = duplicate(loss)
    again = step(twin, way, torch.tensor([6.0, 1.0]), torch.tensor([4.0, 2.0]))
    assert again.item() == value.item()
    assert (loss.train_metric.update_count, twin.train_metric.update_count) == (1, 2)
    assert twin.loss_type == loss.loss_type


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_in_inference_mode_and_training_by_autocast(way: str) -> None:
    loss = (beside_rows if way == "given" else given_loss)()
    sums, weight = torch.tensor([6.0, 1.0], requires_grad=True), torch.tensor([4.0, 2.0])
    with torch.inference_mode():
        step(loss.eval(), way, sums, weight)
    step(loss.eval(), way, sums, weight).backward()
    with torch.autocast("cpu", torch.bfloat16):
        result = step(loss.train(), way, (sums * 257), weight)
        result.backward()
    assert result.dtype == torch.float32
    assert loss.eval_metric.update_count == 2
    assert loss.train_metric.compute()["loss/a"].item() == 6 * 257 / 4


# Ranks.


class Aux(nn.Module):
    """A head, the loss of whose outputs is their mean square, given without a weight, beside a loss of rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2, dtype=torch.float64)
        nn.init.constant_(self.heads.weight, 0.5)
        nn.init.constant_(self.heads.bias, -0.25)
        self.loss = MultiTaskLoss({"aux": "given", "like": "bce_with_logits"}, ["aux", "like"], **options)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses."""
        logits = self.heads(features)
        return self.loss(logits[:, 1:], labels, given={"aux": logits[:, 0].square().sum() / 7})


SIZES = (3, 0, 5)


def parts() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.rand(size, 4, generator=generator, dtype=torch.float64) for size in SIZES]
    return [(each[:, :3], each[:, 3:]) for each in rows]


def train_with_a_bare_loss(rank: int) -> tuple[dict[str, float], dict[str, float], list[list[float]], list[int]]:
    model = Aux(global_batch=True)
    ddp = DistributedDataParallel(model)
    with CollectiveLog() as log:
        losses = ddp(*parts()[rank])
    losses["loss"].backward()
    gradients = [each.grad.flatten().tolist() for each in model.parameters() if each.grad is not None]
    calls = [sum("allreduce" in name for name in log.names)]
    return numbers(losses), numbers(model.loss.train_metric.compute()), gradients, calls


def test_a_bare_loss_counts_as_one_row_a_rank(ranks: RankPool) -> None:
    """Its mean is that over ranks, those without a row of another task included."""
    inputs = parts()[: ranks.world_size]
    model = Aux()
    logits = [model.heads(features) for features, _ in inputs]
    aux = torch.stack([each[:, 0].square().sum() / 7 for each in logits]).mean()
    like = F.binary_cross_entropy_with_logits(
        torch.cat([each[:, 1:] for each in logits]), torch.cat([labels for _, labels in inputs])
    )
    ((aux + like) / 2).backward()
    exact = {"loss/aux": aux.item(), "loss/like": like.item(), "loss": (aux.item() + like.item()) / 2}
    gradients = [each.grad.flatten().tolist() for each in model.parameters() if each.grad is not None]
    for losses, computed, found, calls in ranks.run(train_with_a_bare_loss):
        assert losses == pytest.approx(exact, rel=1e-12)
        assert computed == pytest.approx(exact, rel=1e-12)
        assert found == [pytest.approx(each, rel=1e-12) for each in gradients]
        assert calls == [1]


def other_names(rank: int) -> str:
    loss = MultiTaskLoss("given", TASKS[:: 1 if rank else -1], global_batch=True)
    try:
        loss.from_sums(torch.tensor([6.0, 1.0]), 2)
    except RuntimeError as error:
        return f"{error} {loss.train_metric.update_count}"
    return ""


def test_ranks_that_name_other_tasks_are_told(two_ranks: RankPool) -> None:
    for found in two_ranks.run(other_names):
        assert "expected the same, in this order, on all ranks" in found
        assert found.endswith(" 0")


def uneven_steps(rank: int, over_rows: Any) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Weights that cancel over ranks; one rank has none of a task."""
    loss = given_loss(over_rows, global_batch=True)
    sums = torch.tensor([[6.0, 5.0], [2.0, 0.0], [0.0, 0.0]][rank], dtype=torch.float64)
    weight = torch.tensor([[3.0, 1.0], [-3.0, 0.0], [0.0, 0.0]][rank])
    losses = [loss.from_sums(sums, weight), loss.from_sums(dict(zip(TASKS, sums)), dict(zip(TASKS, weight.tolist())))]
    return [numbers(each) for each in losses], numbers(loss.train_metric.compute())


@pytest.mark.parametrize("over_rows", ["mean", "sum"])
def test_weights_that_cancel_over_ranks(ranks: RankPool, over_rows: str) -> None:
    """They are data of a sum, and none of a mean."""
    for losses, computed in ranks.run(uneven_steps, over_rows):
        if over_rows == "sum":
            assert losses == [{"loss/a": 8.0, "loss/b": 5.0, "loss": 6.5}] * 2
            assert computed == {"loss/a": 16.0, "loss/b": 10.0, "loss": 13.0}
        else:
            assert losses == [{"loss/a": 0.0, "loss/b": 5.0, "loss": 5.0}] * 2
            assert computed == pytest.approx({"loss/a": NAN, "loss/b": 5.0, "loss": 5.0}, nan_ok=True)
