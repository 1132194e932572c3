"""What an update of RankingQuality asks of the device, the compiler, checkpointing and the function transforms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

from benchmarks.counts import KernelLog
from tests.support.checkpointed import WRAPS, Block
from tests.support.pairwise import pairwise
from tests.support.quality_batches import TASKS, Rows, expected, random_rows, recent
from tests.support.results import assert_close, fed, numbers
from twloss import MultiTaskLoss, RankingQuality

WINDOWS = pytest.mark.parametrize("window", [None, 3])


class Model(nn.Module):
    """Heads with a quality metric of their own, and a loss with one attached."""

    def __init__(self, window: int | None, **options: Any) -> None:
        super().__init__()
        self.heads = nn.Linear(4, 3, dtype=torch.float64)
        self.quality = RankingQuality(TASKS, window=window)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, quality=RankingQuality(TASKS, window=window), **options)

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss to train on; the quality is noted on the way."""
        logits = self.heads(features)
        self.quality.update(logits, labels, weights)
        loss: Tensor = self.loss(logits, labels, weights)["loss"]
        return loss

    def qualities(self) -> list[RankingQuality]:
        """The metric of its own, and the one of the loss."""
        return [self.quality, self.loss.train_quality]


def inputs(rows: int, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = (torch.rand(rows, 3, generator=generator) < 0.3).double()
    weights = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64), labels, weights


def rows_of(model: Model, batch: tuple[Tensor, Tensor, Tensor]) -> Rows:
    with torch.no_grad():
        return Rows(model.heads(batch[0]), *batch[1:])


def expect_the_oracles(model: Model, batches: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Every batch is counted once, in both metrics."""
    rows = [rows_of(model, batch) for batch in batches]
    for metric in model.qualities():
        assert metric.update_count == len(batches)
        found = numbers(metric.compute())
        assert_close(recent(found, window=False), expected(rows), 1e-11)
        if metric.window is not None:
            assert_close(recent(found, window=True), expected(rows[-metric.window :]), 1e-11)


# torch.compile.


@pytest.mark.usefixtures("new_compiler")
@WINDOWS
@pytest.mark.parametrize("options", [{}, {"pos_weights": [2.0, 1.0, 3.0], "mean_over": "weights"}], ids=str)
def test_one_graph_and_no_recompilation_over_many_steps_and_row_counts(
    window: int | None, options: dict[str, Any]
) -> None:
    model, counter = Model(window, **options), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    batches = [inputs(rows, step) for step, rows in enumerate([8, 5, 9, 8, 30, 2, 17, 4, 3, 8, 6, 7])]
    for batch in batches:
        for part in batch:
            torch._dynamo.mark_dynamic(part, 0)
        compiled(*batch).backward()
    assert counter.frame_count == 1
    expect_the_oracles(model, batches)
    for metric in model.qualities():
        metric.reset()
    compiled(*batches[0])
    assert counter.frame_count == 1
    expect_the_oracles(model, batches[:1])


@pytest.mark.usefixtures("new_compiler")
def test_extreme_missing_and_left_out_rows_within_a_graph() -> None:
    """The compiled form of the masks is another one."""
    metric = RankingQuality(TASKS, ignore_index=math.nan, nan_strategy="error", window=2)
    batch = random_rows(20, 1, weighted=True, missing=math.nan)
    assert batch.weights is not None
    logits = batch.logits.masked_fill((batch.weights == 0) | batch.labels.isnan(), math.inf)
    logits[:3] = torch.tensor([[1e4], [-1e4], [1e30]], dtype=torch.float64)
    batch = Rows(logits, batch.labels, batch.weights)
    torch.compile(metric.update, fullgraph=True, backend="aot_eager")(*batch)
    assert_close(recent(numbers(metric.compute()), window=True), expected([batch], missing=math.nan))


# Activation checkpointing.


@pytest.mark.usefixtures("new_compiler")
@pairwise(wrap=WRAPS, reentrant={"": False, "reentrant": True}, window=[None, 3])
def test_rows_of_a_checkpointed_block_are_counted_once(
    wrap: Callable[..., Block], reentrant: bool, window: int | None
) -> None:
    model = Model(window)
    wrapped, batches = wrap(model, reentrant), [inputs(8, step) for step in range(5)]
    for features, labels, weights in batches:
        wrapped(features.requires_grad_(), labels, weights).backward()
    expect_the_oracles(model, batches)
    assert all(p.grad is not None for p in model.parameters())


# The device.


# torchmetrics copies a state's default, of which torch warns where it is fake.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pairwise(window=[None, 3], missing=[None, -1, math.nan], strategy=["warn", "error", "ignore", "disable"])
def test_an_update_reads_no_value(window: int | None, missing: float | None, strategy: Any) -> None:
    """Fake tensors have none: whatever waits for the device raises."""
    with FakeTensorMode():
        metric = RankingQuality(TASKS, ignore_index=missing, window=window, nan_strategy=strategy)
        for weights in (None, torch.rand(4, 3), torch.rand(4)):
            for labels in (torch.rand(4, 3), torch.zeros(4, 3, dtype=torch.int64)):
                metric.update(torch.randn(4, 3, requires_grad=True), labels, weights)
                metric.forward(torch.randn(4, 3), labels, weights)
        metric.update(*({task: torch.rand(4) for task in TASKS} for _ in range(3)))
        loss = MultiTaskLoss("bce_with_logits", TASKS, ignore_index=missing, quality=True)
        loss(torch.randn(4, 3, requires_grad=True), torch.rand(4, 3), torch.rand(4))["loss"].backward()


def kernels(tasks: int, window: int | None, *, weighted: bool, missing: float | None = None) -> list[str]:
    """The kernels of an update."""
    metric = RankingQuality([f"task{t}" for t in range(tasks)], window=window, ignore_index=missing)
    batch = random_rows(64, tasks=tasks, weighted=weighted, dtype=torch.float32)
    with KernelLog() as log:
        metric.update(*batch)
    names: list[str] = log.names
    return names


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("missing", [None, -1])
def test_the_number_of_kernels_depends_on_neither_tasks_nor_window(
    window: int | None, weighted: bool, missing: float | None
) -> None:
    one, many, more = (kernels(tasks, window, weighted=weighted, missing=missing) for tasks in (1, 10, 100))
    assert one == many == more
    assert sum("binary_cross_entropy" in name for name in more) <= 1
    if window == 100:
        assert many == kernels(10, 1, weighted=weighted, missing=missing)


# Function transforms, and graphs.


def test_transforms_give_right_derivatives_and_track_nothing() -> None:
    features, labels, weights = inputs(7)
    model = Model(3)
    logits = model.heads(features).detach()

    def function(x: Tensor) -> Tensor:
        model.quality.update(x, labels, weights)
        loss: Tensor = model.loss(x, labels, weights)["loss"]
        return loss

    by_grad = grad(function)(logits)
    by_vmap = vmap(grad(function))(torch.stack([logits, logits + 1]))
    assert [metric.update_count for metric in model.qualities()] == [0, 0]
    leaf = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(function(leaf), leaf)
    assert torch.allclose(by_grad, exact, rtol=1e-12)
    assert torch.allclose(by_vmap[0], exact, rtol=1e-12)
    assert [metric.update_count for metric in model.qualities()] == [1, 1]


@WINDOWS
def test_no_graph_is_kept_alive(window: int | None) -> None:
    model = Model(window)
    model(*inputs(5))
    for metric in model.qualities():
        assert not metric.totals.requires_grad
        assert metric.totals.grad_fn is None
    copy.deepcopy(model)
    labels, weights = torch.rand(5, 3, requires_grad=True), torch.rand(5, 3, requires_grad=True)
    metric = fed(RankingQuality(TASKS, window=window), [Rows(torch.randn(5, 3, requires_grad=True), labels, weights)])
    assert metric.totals.grad_fn is None


def test_transforms_track_nothing_by_segments_and_a_gradient_is_none_of_the_sums() -> None:
    """Ids may be mapped over as well."""
    quality = RankingQuality(TASKS, segments={"country": 2})
    logits, ids = torch.randn(2, 6, 3, dtype=torch.float64), torch.randint(-1, 3, (2, 6))

    def function(x: Tensor, of_rows: Tensor) -> Tensor:
        quality.update(x, torch.ones(6, 3), segments={"country": of_rows})
        return x.square().sum()

    assert torch.equal(vmap(grad(function))(logits, ids), 2 * logits)
    assert torch.equal(vmap(grad(function), in_dims=(0, None))(logits, ids[0]), 2 * logits)
    assert quality.update_count == 0
    of_each = vmap(lambda x, of_rows: quality(x, torch.ones(6, 3), segments={"country": of_rows}))(logits, ids)
    assert quality.update_count == 0
    for place in range(2):
        leaf = logits[place].clone().requires_grad_()
        result = quality(leaf, torch.ones(6, 3), segments={"country": ids[place]})
        assert not any(value.requires_grad for value in result.values())
        found = {key: value[place].item() for key, value in of_each.items()}
        assert found == pytest.approx({key: value.item() for key, value in result.items()}, nan_ok=True)
    assert (quality.update_count, quality.totals.requires_grad) == (2, False)
