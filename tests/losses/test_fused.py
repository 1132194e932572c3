"""``fused=True``: what is compiled and how often, what is not, and what a fused pass keeps and hands over."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from benchmarks.counts import KernelLog
from tests.support.cases import Settings
from tests.support.compiler import FEWEST_ROWS
from tests.support.definition import LOSS_TOLERANCE, expect_the_definition
from tests.support.pairwise import pairwise
from twloss import Loss, LossType, MultiTaskLoss, RankingQuality
from twloss._rows import compiled as compiled_passes

TASKS = ["like", "reply", "retweet"]
ROWS = 37


def batch(rows: int = ROWS, tasks: int = 3, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and weights, of which some are 0."""
    logits, labels = torch.randn(rows, tasks, **options), torch.rand(rows, tasks, **options)
    return logits, labels, torch.rand(rows, tasks, **options) * (torch.rand(rows, tasks) < 0.8)


def step(loss: Any, logits: Tensor, *others: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The losses, and the gradient of the global one."""
    logits = logits.detach().requires_grad_()
    result = loss(logits, *others)
    return result, torch.autograd.grad(result["loss"], logits)[0]


def expect_equal(found: tuple[dict[str, Tensor], Tensor], expected: tuple[dict[str, Tensor], Tensor]) -> None:
    """The same losses and the same gradient, but for rounding."""
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def both(*arguments: Any, **options: Any) -> tuple[MultiTaskLoss, MultiTaskLoss]:
    """A loss as it is, and the same fused."""
    made = [MultiTaskLoss("bce_with_logits", TASKS, *arguments, **options, fused=fused) for fused in (False, True)]
    return made[0], made[1]


# Against the definition.


def graphs() -> int:
    """How many graphs the compiler has made so far."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("new_compiler")
@pairwise(
    dtype=list(LOSS_TOLERANCE),
    pos_weights={"": None, "pos_weights": [0.5, 27.3, 4.0]},
    weighted={"": False, "weighted": True},
    mean_over=["rows", "weights"],
    ignore_index=[None, -1.0, math.nan],
    quality=["none", "all updates", "a window"],
    global_batch={"": False, "global_batch": True},
    rows=[32, 37],
)
def test_losses_gradients_and_running_sums_are_those_of_the_definition_from_one_graph(
    dtype: torch.dtype,
    pos_weights: list[float] | None,
    weighted: bool,
    mean_over: Any,
    ignore_index: float | None,
    quality: str,
    global_batch: bool,
    rows: int,
) -> None:
    counters.clear()
    case = Settings(pos_weights=pos_weights, mean_over=mean_over, ignore_index=ignore_index, fused=True)
    own = RankingQuality(case.names(), window=2, ignore_index=ignore_index)
    attached = {"none": False, "all updates": True, "a window": own}[quality]
    expect_the_definition(case, rows, dtype, weighted=weighted, global_batch=global_batch, quality=attached)
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("new_compiler")
def test_where_labels_may_be_missing_there_are_always_weights_for_the_compiler() -> None:
    counters.clear()
    eager, fused = both(ignore_index=-1.0)
    for inputs in (batch(64), batch(64)[:2]):
        expect_equal(step(fused, *inputs), step(eager, *inputs))
    assert graphs() == 1


# What is compiled.


@pytest.mark.usefixtures("new_compiler")
def test_one_graph_serves_any_number_of_rows_and_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are no multiple of sixteen are filled up; fewer than 32 are not worth the call of a graph."""
    monkeypatch.setattr("twloss._rows.row_pass._FEWEST_ROWS", FEWEST_ROWS)
    counters.clear()
    eager, fused = both()
    for rows in (4096, 7, 0, 1, 4096, 64, 4097, 1000, 31, 2, 3, 17, 16, 8, 5000):
        inputs = batch(rows)[:2]
        expect_equal(step(fused, *inputs), step(eager, *inputs))
    assert graphs() == 1
    for tasks in (10, 2, 16):
        loss = MultiTaskLoss("bce_with_logits", [f"{t}" for t in range(tasks)], fused=True)
        for rows in (512, 33):
            step(loss, *batch(rows, tasks)[:2])
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_has_a_graph_of_its_own_that_makes_no_slopes(context: Any) -> None:
    eager, fused = both()
    inputs = batch()
    with context():
        result, expected = fused.eval()(*inputs), eager.eval()(*inputs)
    torch.testing.assert_close(dict(result), dict(expected))
    assert not any(value.requires_grad for value in result.values())
    torch.testing.assert_close(fused.eval_metric.compute(), eager.eval_metric.compute())
    expect_equal(step(fused.train(), *inputs), step(eager.train(), *inputs))


def test_where_the_compiler_is_switched_off_the_numbers_agree() -> None:
    eager, fused = both()
    inputs = batch()
    with torch.compiler.set_stance("force_eager"):
        expect_equal(step(fused, *inputs), step(eager, *inputs))


# What is not compiled.


def learned(loss: MultiTaskLoss, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return step(loss, logits, labels.requires_grad_(), weights.requires_grad_())


def compiled(loss: MultiTaskLoss, *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return step(torch.compile(loss, fullgraph=True, backend="aot_eager"), *inputs)


def transformed(loss: MultiTaskLoss, logits: Tensor, *others: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    def call(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = loss(logits, *others)
        return result["loss"], result

    gradient, result = torch.func.grad(call, has_aux=True)(logits)
    return result, gradient


def counted(loss: MultiTaskLoss, *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    with KernelLog():
        return step(loss, *inputs)


def called_with_other_parameters(loss: MultiTaskLoss, *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return step(lambda *each: functional_call(loss, {}, each), *inputs)


@pytest.mark.parametrize("how", [learned, compiled, transformed, counted, called_with_other_parameters])
def test_elsewhere_the_numbers_agree(how: Any) -> None:
    eager, fused = both(pos_weights=[0.5, 27.3, 4.0])
    inputs = batch()
    expected = step(eager, *inputs)
    expect_equal(how(fused, *(each.clone() for each in inputs)), expected)
    assert fused.train_metric.update_count == (0 if how is transformed else 1)


def test_of_mixed_types_the_binary_tasks_are_fused() -> None:
    types = {"like": LossType.BCE_WITH_LOGITS, "stars": LossType.CROSS_ENTROPY, "reply": LossType.BCE_WITH_LOGITS}
    logits = {"like": torch.randn(33), "stars": torch.randn(33, 4), "reply": torch.randn(33)}
    labels = {"like": torch.rand(33), "stars": torch.randint(0, 4, (33,)), "reply": torch.rand(33)}
    results = []
    for fused in (False, True):
        loss = MultiTaskLoss(types, list(types), quality=True, fused=fused)
        leaves = {task: values.clone().requires_grad_() for task, values in logits.items()}
        loss(leaves, labels)["loss"].backward()
        computed = {**loss.train_metric.compute(), **loss.train_quality.compute()}
        results.append((computed, {task: leaf.grad for task, leaf in leaves.items()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["cross_entropy", nn.functional.mse_loss, {"like": "cross_entropy"}])
def test_a_loss_without_a_binary_task_can_not_be_fused(loss_type: Any) -> None:
    with pytest.raises(ValueError, match=r"fused: got True with .*expected it with BCE_WITH_LOGITS only"):
        MultiTaskLoss(loss_type, ["like"], fused=True)
    if not isinstance(loss_type, dict):
        with pytest.raises(ValueError, match="fused: got True"):
            Loss(loss_type, fused=True)


# What it keeps, and hands over.


@pytest.mark.parametrize("rows", [ROWS, 512])
@pytest.mark.parametrize("fused", [False, True])
def test_a_second_backward_gives_the_same_gradient(fused: bool, rows: int) -> None:
    pos_weights = torch.tensor([0.5, 27.3, 4.0])
    loss = both(pos_weights=pos_weights)[fused]
    logits, labels, weights = batch(rows)
    logits.requires_grad_()
    result = loss(logits, labels, weights)
    found = [
        torch.autograd.grad(result[key], logits, retain_graph=True)[0] for key in ("loss", "loss", "loss/reply", "loss")
    ]
    assert len({each.data_ptr() for each in found}) == 4
    first, second, of_a_task, fourth = found
    assert torch.equal(first, second)
    assert torch.equal(first, fourth)
    x, y, w = (each.detach().double() for each in (logits, labels, weights))
    exact = w * ((1 - y) * x.sigmoid() - pos_weights * y * (-x).sigmoid()) / rows
    torch.testing.assert_close(first.double(), exact / 3, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(of_a_task[:, 1].double(), exact[:, 1], rtol=1e-5, atol=1e-9)
    assert not of_a_task[:, [0, 2]].any()
    result["loss"].backward()
    with pytest.raises(RuntimeError, match="second time"):
        result["loss"].backward()


def test_a_gradient_to_be_differentiated_again() -> None:
    loss, logits = both()[1], torch.randn(ROWS, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(ROWS, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels)["loss"], (logits,))


def test_the_callers_own_tensors_are_all_that_is_saved_and_none_is_changed() -> None:
    loss = both(pos_weights=[1.0, 2.0, 3.0])[1]
    inputs = batch()
    before = [each.clone() for each in inputs]
    inputs[0].requires_grad_()
    saved: list[Tensor] = []

    def keep(each: Tensor) -> Tensor:
        saved.append(each)
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        result = loss(*inputs)
    result["loss"].backward()
    own = {each.data_ptr() for each in inputs}
    assert {each.data_ptr() for each in saved if each.numel() > 3} <= own
    assert all(torch.equal(each.detach(), was) for each, was in zip(inputs, before))


@pytest.mark.parametrize("reentrant", [True, False])
def test_rows_of_a_checkpointed_forward_are_counted_once(reentrant: bool) -> None:
    eager, fused = both()
    head = nn.Linear(4, 3)
    features, labels = torch.randn(ROWS, 4, requires_grad=True), torch.rand(ROWS, 3)
    gradients = []
    for loss in (eager, fused):
        head.zero_grad()
        checkpoint(lambda x, loss=loss: loss(head(x), labels)["loss"], features, use_reentrant=reentrant).backward()
        gradients.append(head.weight.grad)
        assert loss.train_metric.update_count == 1
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(fused.train_metric.compute(), eager.train_metric.compute(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "parameter", "bfloat16", "integers", "autocast"])
def test_inputs_of_every_kind(kind: str) -> None:
    eager, fused = both()
    logits, labels, weights = batch(32)
    if kind == "transposed":
        logits, labels = logits.T.contiguous().T, labels.T.contiguous().T
    elif kind == "expanded":
        logits, weights = logits[:1].expand(32, 3), weights[:, :1]
    elif kind == "bfloat16":
        logits, labels = logits.bfloat16(), labels.bfloat16()
    elif kind == "integers":
        labels = labels.round().to(torch.int8)
    results = []
    for loss in (eager, fused):
        leaf: Tensor = nn.Parameter(logits.clone()) if kind == "parameter" else logits.detach().clone().requires_grad_()
        with torch.autocast("cpu", enabled=kind == "autocast"):
            result = loss(leaf if kind != "transposed" else leaf.T.contiguous().T, labels, weights)
        result["loss"].backward()
        assert result["loss"].dtype == torch.float32
        results.append((dict(result), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-7)


def test_one_task_of_any_shape() -> None:
    for shape in ((), (1,), (9,), (32,), (6, 5), (2, 3, 4)):
        results = []
        logits, labels = torch.randn(shape), torch.rand(shape)
        for fused in (False, True):
            loss, leaf = Loss("bce_with_logits", pos_weight=3.0, fused=fused), logits.clone().requires_grad_()
            result = loss(leaf, labels)
            result.backward()
            results.append((result.detach(), leaf.grad, loss.train_metric.compute()))
        torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-7)


def test_task_weights_change_at_any_time() -> None:
    eager, fused = both()
    inputs = batch()
    for weights in (None, [1.0, 0.0, 2.0], [3.0, 1.0, 1.0], None):
        eager.task_weights = fused.task_weights = weights
        expect_equal(step(fused, *inputs), step(eager, *inputs))


def test_what_is_not_finite_is_left_out_by_the_rule_of_the_metric() -> None:
    loss = both()[1]
    logits, labels, _ = batch()
    loss(logits, labels)
    expected = loss.train_metric.compute()
    spoilt = logits.clone()
    spoilt[0, 1] = math.nan
    assert loss(spoilt, labels)["loss/reply"].isnan()
    with pytest.warns(UserWarning, match="not finite: reply: 1$"):
        assert loss.train_metric.compute()["loss/reply"] == expected["loss/reply"]
    loss.train_metric.nan_strategy = "disable"
    loss(spoilt, labels)
    assert loss.train_metric.compute()["loss/reply"].isnan()


def test_copies_are_fused_and_count_by_themselves() -> None:
    loss = both()[1]
    inputs = batch()
    step(loss, *inputs)
    twin = copy.deepcopy(loss)
    step(twin, *inputs)
    assert (twin.fused, twin.train_metric.update_count, loss.train_metric.update_count) == (True, 2, 1)
    with pytest.raises(AttributeError, match="fused is read-only: create a new loss"):
        loss.fused = False


def test_a_copy_is_not_compiled_again() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], fused=True)
    passes = []
    for each in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        each(torch.zeros(4, 2, requires_grad=True), torch.ones(4, 2))["loss"].backward()
        passes.append(compiled_passes._compiled.cache_info().misses)
    assert passes[0] == passes[-1]
