"""The running sums: what update() adds, what compute() gives, and what must never happen to them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.support import reference
from twloss import GlobalLoss, Loss, MultiTaskLoss

TASKS = ["like", "reply", "retweet", "dwell"]


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    """The numbers of a result."""
    return {key: value.item() for key, value in losses.items()}


def expected(loss_sums: list[float], weights: list[float], task_reduction: str, reduction: str) -> dict[str, float]:
    """The oracle's losses of given sums: one row of weight n and loss s/n for each task has exactly these sums."""
    columns = {task: [reference.Row(s / n, weight=n)] if n else [] for task, s, n in zip(TASKS, loss_sums, weights)}
    return reference.losses(columns, reference.Rule(task_reduction, reduction, "weights"))


@pytest.mark.parametrize("task_reduction", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "median"])
@pytest.mark.parametrize("present", list(itertools.product([0, 1], repeat=4)))
def test_reductions_are_over_the_tasks_with_data(task_reduction: str, reduction: str, present: tuple[int, ...]) -> None:
    loss_sums = [7.0 * n for n in (3.0, 1.0, 4.0, 2.0)]
    weights = [8.0 * n for n in present]
    metric = GlobalLoss(TASKS, task_reduction, reduction)
    metric.update(torch.tensor(loss_sums, dtype=torch.float64) * torch.tensor(present), torch.tensor(weights))
    assert values(metric.compute()) == pytest.approx(
        expected(loss_sums, weights, task_reduction, reduction), rel=1e-14, nan_ok=True
    )


def test_the_mean_is_over_rows_and_not_over_batches() -> None:
    """A mean of the two batches' means would be 2.0."""
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([1000.0]), 1000)
    metric.update(torch.tensor([3.0]), 1)
    assert metric.compute()["loss"].item() == pytest.approx(1003 / 1001, rel=1e-15)


def test_results_are_detached_float64_in_the_order_of_the_tasks() -> None:
    metric = GlobalLoss(TASKS)
    metric.update(torch.ones(4, requires_grad=True), torch.full((4,), 2))
    result = metric.compute()
    assert list(result) == [*(f"loss/{task}" for task in TASKS), "loss"]
    for value in result.values():
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert not value.requires_grad


def test_one_task_has_one_key() -> None:
    metric = GlobalLoss(None)
    metric.update(torch.tensor(3.0), 2)
    metric.update(torch.tensor([4.0]), torch.tensor(2))
    assert values(metric.compute()) == {"loss": 1.75}


def test_before_any_update_everything_is_nan_and_compute_says_so() -> None:
    metric = GlobalLoss(["like"])
    assert (metric.update_count, metric.update_called) == (0, False)
    with pytest.warns(UserWarning, match="before update"):
        result = metric.compute()
    assert all(value.isnan() for value in result.values())


def test_updates_without_rows_leave_nan_and_do_not_warn() -> None:
    metric = GlobalLoss(["like"])
    metric.update(torch.zeros(1), 0)
    assert (metric.update_count, metric.update_called) == (1, True)
    assert metric.compute()["loss"].isnan()


def test_reset_starts_anew() -> None:
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([5.0]), 1)
    metric.reset()
    assert metric.update_count == 0
    metric.update(torch.tensor([2.0]), 4)
    assert metric.compute()["loss"].item() == 0.5


def test_forward_returns_the_batch_and_keeps_the_sums() -> None:
    metric = GlobalLoss(["like"])
    assert metric(torch.tensor([8.0]), 2)["loss"].item() == 4.0
    assert metric(torch.tensor([1.0]), 4)["loss"].item() == 0.25
    assert metric.compute()["loss"].item() == 1.5
    assert metric.update_count == 2


def test_sums_do_not_stop_at_the_precision_of_float32() -> None:
    """1e9 rows at 0.3, then 1000 batches at 0.01: a float32 sum does not move any more."""
    metric, mean = GlobalLoss(["like"]), MeanMetric()
    metric.update(torch.tensor([3e8], dtype=torch.float64), 10**9)
    mean.update(0.3, 1e9)
    for _ in range(1000):
        metric.update(torch.tensor([10.24], dtype=torch.float64), 1024)
        mean.update(0.01, 1024)
    exact = (3e8 + 10240) / (1e9 + 1024000)
    assert metric.compute()["loss"].item() == pytest.approx(exact, rel=1e-12)
    assert mean.compute().item() != pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("weight", [0.1, 16777217.0, 2**53, torch.tensor(0.1, dtype=torch.float64)])
def test_a_weight_keeps_all_of_its_digits(weight: Any) -> None:
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([0.1], dtype=torch.float64), weight)
    assert metric.compute()["loss"].item() == 0.1 / float(weight)


def test_values_do_not_share_memory_with_the_sums() -> None:
    metric = GlobalLoss(["like"], "sum", "sum")
    metric.update(torch.tensor([2.0]), 1)
    for value in metric.compute().values():
        value.zero_()
    assert values(metric.compute()) == {"loss/like": 2.0, "loss": 2.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss_sum", "weight"])
def test_sums_that_are_not_finite_are_left_out_counted_and_named(place: str, bad: float) -> None:
    def feed(metric: GlobalLoss) -> GlobalLoss:
        metric.update(torch.tensor([1.0, 2.0]), torch.tensor([2, 2]))
        for _ in range(3):
            spoilt, sound = torch.tensor([4.0, bad]), torch.tensor([2.0, 2.0])
            metric.update(*((spoilt, sound) if place == "loss_sum" else (sound * 2, spoilt / 2)))
        return metric

    clean = {"loss/like": 13 / 8, "loss/reply": 1.0, "loss": 21 / 16}
    with pytest.warns(UserWarning, match=r"\{'reply': 3\}"):
        assert values(feed(GlobalLoss(["like", "reply"])).compute()) == clean
    assert values(feed(GlobalLoss(["like", "reply"], nan_strategy="ignore")).compute()) == clean
    let_in = values(feed(GlobalLoss(["like", "reply"], nan_strategy="disable")).compute())
    assert let_in["loss/like"] == 13 / 8
    assert not math.isfinite(let_in["loss/reply"]) or let_in["loss/reply"] == 0.0
    metric = feed(GlobalLoss(["like", "reply"], nan_strategy="error"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"\{'reply': 3\}"):
            metric.compute()
    metric.reset()
    metric.update(torch.ones(2), 1)
    assert values(metric.compute())["loss"] == 1.0


def test_a_loss_that_is_not_finite_stays_so_while_its_sums_are_left_out() -> None:
    """A gradient scaler has to see it."""
    loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
    result = loss(torch.tensor([[0.0, math.nan]]), torch.ones(1, 2))
    assert result["loss/like"].isfinite()
    assert result["loss"].isnan()
    with pytest.warns(UserWarning, match="'reply': 1"):
        assert loss.train_metric.compute()["loss"].item() == pytest.approx(math.log(2))


def test_forward_feeds_the_metric_of_the_mode() -> None:
    loss = Loss("bce_with_logits")
    loss(torch.zeros(3), torch.ones(3))
    loss.eval()
    loss(torch.full((2,), 100.0), torch.zeros(2))
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(math.log(2))
    assert loss.eval_metric.compute()["loss"].item() == pytest.approx(100.0)
    loss.eval_metric.reset()
    assert loss.train_metric.update_called


def test_nothing_is_a_registered_buffer_or_in_the_state_dict() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[1, 2, 3, 4], task_weights=[1, 2, 3, 4])
    assert list(loss.buffers()) == []
    assert list(loss.parameters()) == []
    assert list(loss.state_dict()) == []


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.float16),
    "_apply": lambda m: m._apply(lambda t: t.to(torch.float16)),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_the_model_leave_sums_and_constants_alone(cast: Any) -> None:
    model = nn.ModuleDict(
        {"head": nn.Linear(2, 1), "loss": MultiTaskLoss("bce_with_logits", ["x"], pos_weights=[27.3])}
    )
    loss = model["loss"]
    assert isinstance(loss, MultiTaskLoss)
    exact = 1e8 + 1 / 3
    for _ in range(2):
        cast(model)
        loss.train_metric.update(torch.tensor([exact], dtype=torch.float64), 1)
    assert values(loss.train_metric.compute())["loss"] == exact
    loss.train_metric.reset()
    assert loss.train_metric.totals.dtype == torch.float64
    loss(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1))
    assert values(loss.train_metric.compute())["loss"] == pytest.approx(27.3 * math.log(2), rel=1e-15)


def test_the_meta_device_ends_in_zeros_and_keeps_constants() -> None:
    with torch.device("meta"):
        loss = MultiTaskLoss("bce_with_logits", ["x"], pos_weights=[27.3], task_weights=[2.0])
    loss.to_empty(device="cpu")
    assert loss.train_metric.update_count == 0
    result = loss(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1))
    assert result["loss"].item() == pytest.approx(2 * 27.3 * math.log(2), rel=1e-15)
    assert values(loss.train_metric.compute())["loss"] == result["loss"].item()
    loss.to("meta")
    loss.to_empty(device="cpu")
    assert loss.train_metric.update_count == 0
    loss.train_metric.reset()
    assert (loss.train_metric.totals == 0).all()


def test_inference_mode_does_not_spoil_the_training_that_follows() -> None:
    with torch.inference_mode():
        loss = Loss("bce_with_logits", pos_weight=2.0)
        loss(torch.zeros(1), torch.ones(1))
        loss.train_metric.compute()
        loss.train_metric.reset()
    logits = torch.zeros(1, requires_grad=True)
    loss(logits, torch.ones(1)).backward()
    assert loss.train_metric.compute()["loss"].item() == pytest.approx(2 * math.log(2))


def test_an_update_between_sync_and_unsync_is_an_error_and_loses_nothing() -> None:
    metric = GlobalLoss(["like"], distributed_available_fn=lambda: True)
    metric.update(torch.ones(1), 1)
    metric.sync()
    with pytest.raises(TorchMetricsUserError, match="between sync"):
        metric.update(torch.ones(1), 1)
    metric.unsync()
    assert metric.update_count == 1


def test_copies_are_independent() -> None:
    metric = GlobalLoss(["like"])
    metric.update(torch.tensor([1.0]), 1)
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        twin.update(torch.tensor([3.0]), 1)
        assert twin.compute()["loss"].item() == 2.0
    assert metric.compute()["loss"].item() == 1.0


def test_merge_state_adds() -> None:
    a, b = GlobalLoss(["like"]), GlobalLoss(["like"])
    a.update(torch.tensor([1.0]), 1)
    b.update(torch.tensor([8.0]), 2)
    a.merge_state(b)
    assert a.compute()["loss"].item() == 3.0


def test_no_graph_is_kept_alive() -> None:
    logits = torch.zeros(4, 1, requires_grad=True)
    loss = MultiTaskLoss("bce_with_logits", ["like"])
    loss(logits, torch.ones(4, 1))
    assert not loss.train_metric.totals.requires_grad
    assert loss.train_metric.totals.grad_fn is None


def test_plot_draws_one_result_or_several() -> None:
    metric = GlobalLoss(["like", "reply"])
    metric.update(torch.tensor([1.0, 2.0]), 2)
    for value in (None, metric.compute(), [metric.compute(), metric.compute()]):
        figure, axes = metric.plot(value)
        assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"loss/like", "loss/reply", "loss"}
        pyplot.close(figure)


WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no tensor": ([1.0, 2.0], 1, TypeError, "loss_sum: got list"),
    "shape": (torch.ones(3), 1, ValueError, "loss_sum: .*(3,).*expected (2,)"),
    "rank": (torch.ones(2, 1), 1, ValueError, "loss_sum"),
    "0-dim": (torch.ones(()), 1, ValueError, "loss_sum"),
    "complex": (torch.ones(2, dtype=torch.complex64), 1, TypeError, "loss_sum: got torch.complex64"),
    "weight shape": (torch.ones(2), torch.ones(3), ValueError, "weight: .*(3,).*expected (2,)"),
    "weight type": (torch.ones(2), "1", TypeError, "weight: got str"),
    "weight list": (torch.ones(2), [1, 1], TypeError, "weight: got list"),
    "weight bool": (torch.ones(2), True, TypeError, "weight: got bool"),
    "weight device": (torch.ones(2), torch.ones(2, device="meta"), ValueError, "weight: got a tensor on meta"),
}


@pytest.mark.parametrize(("loss_sum", "weight", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_update_is_a_clear_error_and_changes_nothing(
    loss_sum: Any, weight: Any, error: type[Exception], message: str
) -> None:
    metric = GlobalLoss(["like", "reply"])
    metric.update(torch.ones(2), 1)
    before = metric.totals.clone()
    for call in (metric.update, metric.forward):
        with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
            call(loss_sum, weight)
    assert torch.equal(metric.totals, before)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (("like",), {}, TypeError, "tasks: got str"),
        (([],), {}, ValueError, "tasks"),
        ((["a", "a"],), {}, ValueError, "tasks"),
        ((["a", ""],), {}, ValueError, "tasks"),
        (([1],), {}, TypeError, "tasks"),
        ((["a"], "max"), {}, ValueError, "task_loss_reduction: got 'max'"),
        ((["a"], None), {}, TypeError, "task_loss_reduction: got NoneType"),
        ((["a"], "mean", "prod"), {}, ValueError, "global_reduction: got 'prod'"),
        ((["a"], "mean", 3), {}, TypeError, "global_reduction: got int"),
        ((["a"],), {"nan_strategy": "impute"}, ValueError, "nan_strategy: got 'impute'"),
        ((["a"],), {"nan_strategy": 0.0}, TypeError, "nan_strategy: got float"),
        ((["a"],), {"task_weights": [1, 2]}, ValueError, "task_weights: got 2 values"),
        ((["a"],), {"task_weights": [math.nan]}, ValueError, "task_weights"),
        ((["a"],), {"task_weights": "1"}, TypeError, "task_weights"),
        ((["a"],), {"task_weights": {"b": 1}}, ValueError, "task_weights"),
        ((["a"],), {"compute_with_cache": True}, ValueError, "compute_with_cache"),
        ((["a"],), {"unknown": 1}, ValueError, "unknown"),
    ],
)
def test_wrong_arguments_are_clear_errors(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GlobalLoss(*args, **kwargs)


def test_a_module_as_reduction_is_used_but_not_registered() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, losses: Tensor) -> Tensor:
            return self.factor * losses.sum()

    metric = GlobalLoss(["like", "reply"], "mean", Doubled())
    assert list(metric.parameters()) == []
    metric.update(torch.tensor([1.0, 2.0]), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(metric.compute())["loss"] == 6.0
