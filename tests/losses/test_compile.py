"""torch.compile and activation checkpointing: one graph, no recompilation, and every row counted once."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from tests.support import reference
from tests.support.checkpointed import WRAPS, Block, once
from tests.support.metrics import weights_of
from tests.support.pairwise import pairwise
from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, Loss, MultiTaskLoss

ROWS, TASKS = 8, ["a", "b"]


FORMS = ("rows", "sums", "sums and a number", "sums by task", "given", "bare")


class Model(nn.Module):
    """A model with its loss as a submodule, to which it hands rows, or sums that it makes, in one of the forms."""

    def __init__(self, form: str = "rows", **kwargs: Any) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2)
        types: Any = "bce_with_logits" if form == "rows" else "given"
        if form in ("given", "bare"):
            types = {"a": "given", "b": "bce_with_logits"}
            kwargs = {"pos_weights": {"b": 2.0}, **kwargs}
        elif form == "rows":
            kwargs = {"pos_weights": [1.5, 2.0], **kwargs}
        self.loss = MultiTaskLoss(types, TASKS, **kwargs)
        self.form = form

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The global loss."""
        return self.losses(self.heads(features), labels, weights)["loss"]

    def losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        """The losses, of rows or of sums."""
        if self.form == "rows":
            return self.loss(logits, labels, weights)
        sums = (logits - labels).square().sum(0)
        if self.form in ("given", "bare"):
            own = weights[:, 1:] if weights is not None else None
            given: Any = (sums[0], len(labels)) if self.form == "given" else sums[0] / 8
            return self.loss(logits[:, 1:], labels[:, 1:], own, given={"a": given})
        if self.form == "sums by task":
            return self.loss.from_sums(dict(zip(TASKS, sums)), {"a": len(labels), "b": labels.shape[0] + labels.sum()})
        return self.loss.from_sums(sums, len(labels) if "number" in self.form else labels.sum(0) + len(labels))


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 3), torch.randint(0, 2, (rows, 2)).float(), torch.rand(rows, 2)


pytestmark = pytest.mark.usefixtures("new_compiler")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "missing labels": {"ignore_index": math.nan, "task_weights": [1.0, 3.0]},
    "weights and median": {"mean_over": "weights", "global_reduction": "median", "global_batch": True},
    "callable": {"global_reduction": Tensor.sum, "global_batch": True},
}


@pairwise(options=OPTIONS, form=FORMS)
def test_one_graph_in_each_mode_and_no_recompilation_in_20_steps(options: dict[str, Any], form: str) -> None:
    if form != "rows":
        options = {name: value for name, value in options.items() if name != "ignore_index"}
    model, twin = Model(form, **options), Model(form, **options)
    twin.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for training in (True, False):
        model.train(training)
        twin.train(training)
        counter.frame_count, counter.graphs = 0, []  # as clear() does, which torch 2.6 has not
        for step in range(20):
            inputs = batch()
            loss, expected = compiled(*inputs), twin(*inputs)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
            if training:
                loss.backward()
            if training and step == 10:
                model.loss.train_metric.compute()
                model.loss.train_metric.reset()
                twin.loss.train_metric.reset()
        assert counter.frame_count == 1
    for name in ("train_metric", "eval_metric"):
        ours, theirs = getattr(model.loss, name), getattr(twin.loss, name)
        assert ours.update_count == theirs.update_count > 0
        assert ours.compute()["loss"].item() == pytest.approx(theirs.compute()["loss"].item(), rel=1e-6)


def test_a_metric_of_torchmetrics_recompiles_at_each_step() -> None:
    """The naive version: Metric.update counts in a Python attribute, on which the compiler guards."""

    class Naive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = MeanMetric(nan_strategy="disable")

        def forward(self, values: Tensor) -> Tensor:
            self.metric.update(values)
            return values.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Naive(), backend=counter)
    for _ in range(5):
        compiled(torch.ones(3))
    assert counter.frame_count > 1


def test_a_change_of_batch_size_keeps_the_sums_right() -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (8, 5, 1, 0, 8):
        compiled(*batch(rows))
    assert weights_of(model.loss.train_metric) == pytest.approx([22.0, 22.0])


def test_a_users_own_metric_may_be_in_the_graph() -> None:
    metric = GlobalLoss(["a"])

    def step(values: Tensor) -> Tensor:
        metric.update(values.sum(0, keepdim=True), len(values))
        return values.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(torch.ones(4, requires_grad=True)).backward()
    assert metric.compute()["loss"].item() == 1.0
    assert metric.update_count == 3


@pytest.mark.parametrize("call", ["from_sums", "by task", "given", "update"])
@pytest.mark.parametrize("options", [{}, {"task_loss_reduction": "sum", "validate_args": True}], ids=["", "a sum"])
def test_a_weight_that_is_a_float_is_no_constant_of_the_graph(call: str, options: dict[str, Any]) -> None:
    """One graph for the first number, and one for all others."""
    metric = GlobalLoss(TASKS)
    losses: Any = MultiTaskLoss("given", TASKS, global_reduction="sum", global_batch=True, **options)
    beside: Any = MultiTaskLoss(
        {"a": "given", "b": torch.sub}, TASKS, global_reduction="sum", global_batch=True, **options
    )

    def step(sums: Tensor, weight: float) -> Any:
        if call == "update":
            metric.update(sums, weight)
            return sums.sum() / weight
        if call == "given":
            return beside(sums[None, 1:], sums[None, 1:], given={"a": (sums[0], weight)})["loss/a"]
        by_task = {"a": weight, "b": weight}
        return losses.from_sums(sums, by_task if call == "by task" else weight)["loss/a"]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    sums = torch.tensor([3.0, 0.0])
    for weight in (1.5, 2.25, 3.125, 4.0625, 5.5):
        expected = 3.0 if options and call != "update" else 3.0 / weight
        assert compiled(sums, weight).item() == pytest.approx(expected, rel=1e-6)
    assert counter.frame_count == 2


def train_compiled_under_ddp(rank: int, form: str) -> list[float]:
    warnings.simplefilter("ignore")
    try:
        model = Model(form)
        ddp = DistributedDataParallel(torch.compile(model, fullgraph=True, backend="aot_eager"))
        for _ in range(3):
            ddp(*batch(4 + rank)).backward()
        return weights_of(model.loss.train_metric)
    finally:
        warnings.simplefilter("error")


@pytest.mark.parametrize("form", ["rows", "sums and a number", "given"])
def test_ddp_over_a_compiled_model(two_ranks: RankPool, form: str) -> None:
    for weights in two_ranks.run(train_compiled_under_ddp, form):
        assert weights == pytest.approx([27.0, 27.0])


# Activation checkpointing.


@pairwise(wrap=WRAPS, reentrant=[False, True], form=FORMS)
def test_rows_of_a_checkpointed_block_are_counted_once(wrap: Callable[..., Block], reentrant: bool, form: str) -> None:
    model, twin = Model(form), Model(form)
    twin.load_state_dict(model.state_dict())
    wrapped = wrap(model, reentrant)
    for _ in range(3):
        features, labels, weights = batch()
        wrapped(features.requires_grad_(), labels, weights).backward()
        twin(features, labels, weights)
    assert model.loss.train_metric.update_count == 3
    assert torch.allclose(model.loss.train_metric.totals, twin.loss.train_metric.totals, rtol=1e-6)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_addition_that_does_not_ask_counts_them_twice(reentrant: bool) -> None:
    """The naive version."""
    total = torch.zeros(())

    def block(values: Tensor) -> Tensor:
        total.add_(len(values))
        return values.sigmoid().sum()

    once(block, reentrant)(torch.ones(4, requires_grad=True)).backward()
    assert total.item() == 8


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize(("sizes", "graphs"), [([16, 5, 9, 16, 17], 1), ([5, 16, 48, 7], 1), ([32, 48, 64, 5], 2)])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("pos_weights", [None, [2.0, 3.0]])
def test_no_number_of_rows_is_a_constant_of_the_graph(
    pos_weights: list[float] | None, by_row: bool, sizes: list[int], graphs: int
) -> None:
    """Weights of rows too, and rows that could be seen sixteen abreast."""
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], pos_weights=pos_weights)
    eager, counter = copy.deepcopy(loss), CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in sizes:
        logits, labels = torch.randn(rows, 2), torch.rand(rows, 2)
        weights = torch.rand(rows) if by_row else torch.rand(rows, 2)
        for each in (logits, labels, weights):
            torch._dynamo.mark_dynamic(each, 0)
        expected = eager(logits, labels, weights)["loss"]
        assert compiled(logits, labels, weights)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert counter.frame_count <= graphs


@pytest.mark.parametrize("missing", [-1.0, 2.5, {"a": -1.0}, {"a": math.nan, "b": -1.0}])
def test_a_dynamic_graph_takes_any_number_for_a_missing_label_and_for_a_normalizer(missing: Any) -> None:
    """With ``dynamic=True`` a float is a symbolic number to the compiler."""
    loss = MultiTaskLoss("bce_with_logits", TASKS, ignore_index=missing)
    compiled: Any = torch.compile(loss, dynamic=True, fullgraph=True, backend="eager")
    own = [missing.get(task) if isinstance(missing, dict) else missing for task in TASKS]
    for rows in (6, 9):
        logits = torch.randn(rows, 2, dtype=torch.float64)
        labels = torch.tensor([[(0.0, 1.0, label or 0.0)[n % 3] for label in own] for n in range(rows)])
        columns = {
            task: [
                reference.Row(reference.bce_with_logits(x, y), valid=not reference.is_missing(y, label))
                for x, y in zip(logits[:, t].tolist(), labels[:, t].tolist())
            ]
            for t, (task, label) in enumerate(zip(TASKS, own))
        }
        for normalizer in (None, 3.5):
            exact = reference.losses(columns, reference.Rule(normalizer=normalizer))
            losses = compiled(logits, labels, normalizer=normalizer)
            assert {key: value.item() for key, value in losses.items()} == pytest.approx(exact, rel=1e-12)


@pytest.mark.usefixtures("new_compiler")
def test_a_row_of_weight_0_gets_no_gradient_whatever_comes_back() -> None:
    compiled: Any = torch.compile(Loss("bce_with_logits"), fullgraph=True, backend="aot_eager")
    for upstream in (math.inf, math.nan):
        logits = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        compiled(logits, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0])).backward(torch.tensor(upstream))
        assert logits.grad is not None
        assert logits.grad[1].item() == 0.0
        assert not logits.grad[[0, 2]].isfinite().any()
