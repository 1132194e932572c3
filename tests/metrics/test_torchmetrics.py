"""The metrics inside of torchmetrics' own collections, trackers, compositions and wrappers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection, MetricTracker, wrappers
from torchmetrics.wrappers import (
    BootStrapper,
    ClasswiseWrapper,
    MinMaxMetric,
    MultioutputWrapper,
    MultitaskWrapper,
    Running,
)

from tests.support import reference
from tests.support.quality_batches import random_rows
from tests.support.results import IS_TORCHMETRICS_1_0, compute_each
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality

TASKS = ["like", "reply"]
# (loss sums, weights) of each batch.
BATCHES: list[tuple[list[float], list[float]]] = [
    ([6.0, 1.0], [4.0, 2.0]),
    ([1.0, 0.0], [1.0, 0.0]),
    ([9.0, 3.5], [3.0, 5.0]),
]


def expected(batches: list[tuple[list[float], list[float]]], **rule: Any) -> dict[str, float]:
    """The oracle's losses: a row of weight n and loss s/n has the sums s and n."""
    columns = {
        task: [reference.Row(sums[i] / weights[i], weight=weights[i]) for sums, weights in batches if weights[i]]
        for i, task in enumerate(TASKS)
    }
    return reference.losses(columns, reference.Rule(mean_over="weights", **rule))


def feed(metric: Any, batches: list[tuple[list[float], list[float]]] = BATCHES) -> Any:
    for batch in batches:
        metric.update(*map(torch.tensor, batch))
    return metric


def numbers(values: Any) -> Any:
    return {key: value.item() for key, value in values.items()} if isinstance(values, dict) else values.item()


def views(owner: GlobalLoss) -> dict[str, Metric | MetricCollection]:
    return {"a": owner.scalar("loss/like"), "b": owner.scalar("loss/reply")}


# MetricCollection.


@pytest.mark.skipif(IS_TORCHMETRICS_1_0, reason="of equal keys torchmetrics 1.0.3 keeps the last")
def test_a_collection_within_a_collection_keeps_the_names_apart() -> None:
    inner: dict[str, Metric | MetricCollection] = {
        name: MetricCollection(GlobalLoss(TASKS, "mean", name), prefix=f"{name}/", postfix="")
        for name in ("min", "max")
    }
    collection = feed(MetricCollection(inner))
    found = numbers(collection.compute())
    for name in inner:
        for key, value in expected(BATCHES, global_reduction=name).items():
            assert [v for k, v in found.items() if k.startswith(f"{name}/") and k.endswith(f"_{key}")] == [
                pytest.approx(value, rel=1e-15)
            ]


@pytest.mark.parametrize("compute_groups", [True, False])
def test_a_collection_of_losses_and_others_gives_each_its_own(compute_groups: bool) -> None:
    """Metrics whose settings differ are never one compute group, which would share one state."""
    metrics: dict[str, Metric | MetricCollection] = {
        "mean": GlobalLoss(TASKS),
        "sum": GlobalLoss(TASKS, "sum", "max"),
        "other": MeanMetric(),
    }
    collection = MetricCollection(metrics, compute_groups=compute_groups)
    oracles = {"mean": expected(BATCHES), "sum": expected(BATCHES, task_loss_reduction="sum", global_reduction="max")}
    rows = [(value, weight) for batch in BATCHES for value, weight in zip(*batch)]
    for _ in range(2):
        found = numbers(compute_each(feed(collection)))
        for name, oracle in oracles.items():
            assert {key: found[f"{name}_{key}"] for key in oracle} == pytest.approx(oracle, rel=1e-15)
        other = sum(value * weight for value, weight in rows) / sum(weight for _, weight in rows)
        assert found["other"] == pytest.approx(other, rel=1e-6)
        # Reading a metric gives it a copy of the group's state, which must not hold up the next update.
        assert isinstance(collection["sum"], GlobalLoss)
        collection.reset()
    assert all(len(group) == 1 for group in collection.compute_groups.values())


def test_views_of_one_loss_are_one_compute_group_if_told_so() -> None:
    """Each view feeds its owner, so a collection that feeds every view would count the rows twice."""
    owner = GlobalLoss(TASKS, "sum", "sum")
    collection = feed(MetricCollection(views(owner), compute_groups=[["a", "b"]]))
    oracle = expected(BATCHES, task_loss_reduction="sum", global_reduction="sum")
    both = {"a": pytest.approx(oracle["loss/like"], rel=1e-15), "b": pytest.approx(oracle["loss/reply"], rel=1e-15)}
    assert numbers(collection.compute()) == both
    twin = collection.clone(prefix="twin/")
    collection.reset()
    assert owner.update_count == len(BATCHES)
    assert numbers(twin.compute()) == {f"twin/{name}": value for name, value in both.items()}


def test_views_in_a_collection_of_their_own_may_only_be_read() -> None:
    owner = GlobalLoss(TASKS)
    collection = MetricCollection(views(owner), prefix="val/")
    feed(owner)
    oracle = expected(BATCHES)
    assert numbers(collection.compute()) == pytest.approx(
        {"val/a": oracle["loss/like"], "val/b": oracle["loss/reply"]}, rel=1e-15
    )
    assert list(collection.state_dict()) == []
    collection.reset()
    feed(owner, BATCHES[2:])
    assert numbers(collection.compute())["val/a"] == pytest.approx(3.0, rel=1e-15)
    assert numbers(owner.compute())["loss/like"] == pytest.approx(
        expected([*BATCHES, BATCHES[2]])["loss/like"], rel=1e-15
    )


def test_a_view_beside_other_metrics_is_fed_with_them() -> None:
    collection = feed(MetricCollection({"loss": GlobalLoss(TASKS).scalar("loss"), "mean": MeanMetric()}))
    assert numbers(collection.compute())["loss"] == pytest.approx(expected(BATCHES)["loss"], rel=1e-15)
    collection.reset()
    assert numbers(collection(*map(torch.tensor, BATCHES[0])))["loss"] == pytest.approx(
        expected(BATCHES[:1])["loss"], rel=1e-15
    )


# MetricTracker.


def test_a_tracker_of_views_in_a_collection_finds_the_best_of_each() -> None:
    """The copies that the tracker makes of the views share a copy of the owner, fed once for all of them."""
    collection = MetricCollection(views(GlobalLoss(TASKS)), compute_groups=[["a", "b"]])
    # torchmetrics 1.0.3 does not ask which is better.
    tracker = MetricTracker(collection, **({"maximize": False} if IS_TORCHMETRICS_1_0 else {}))
    for batch in (BATCHES[0], BATCHES[2]):
        tracker.increment()
        feed(tracker, [batch])
    assert tracker.best_metric(return_step=True) == (
        {"a": pytest.approx(1.5, rel=1e-15), "b": pytest.approx(0.5, rel=1e-15)},
        {"a": 0, "b": 0},
    )


# Compositions.


def test_arithmetic_with_views_and_numbers() -> None:
    owner = feed(GlobalLoss(TASKS))
    like, reply = owner.scalar("loss/like"), owner.scalar("loss/reply")
    oracle = expected(BATCHES)
    a, b = oracle["loss/like"], oracle["loss/reply"]
    cases: list[tuple[Metric, float]] = [
        (like + reply, a + b),
        (reply - like, b - a),
        (2.0 * like, 2 * a),
        (like * reply, a * b),
        (like / reply, a / b),
        (abs(reply - like), abs(b - a)),
        (like**2 + torch.tensor(1.0), a * a + 1),
    ]
    for metric, value in cases:
        assert metric.compute().item() == pytest.approx(value, rel=1e-14)
    assert owner.update_count == len(BATCHES)


def test_a_composition_of_two_losses_feeds_and_resets_both() -> None:
    """For instance of the loss of one set of weights and of another's."""
    first, second = GlobalLoss(TASKS), GlobalLoss(TASKS, global_reduction="max")
    gap = second.scalar("loss") - first.scalar("loss")
    value = gap(*map(torch.tensor, BATCHES[0]))
    maximum, mean = (expected(BATCHES[:1], global_reduction=name)["loss"] for name in ("max", "mean"))
    assert value.item() == pytest.approx(maximum - mean, rel=1e-14)
    gap.reset()
    feed(gap, BATCHES[2:])
    maximum, mean = (expected(BATCHES[2:], global_reduction=name)["loss"] for name in ("max", "mean"))
    assert gap.compute().item() == pytest.approx(maximum - mean, rel=1e-14)


def test_a_loss_of_many_values_has_no_arithmetic() -> None:
    with pytest.raises(TypeError):
        (feed(GlobalLoss(TASKS)) + 1.0).compute()


# States, merged.


def test_the_state_of_a_metric_is_merged() -> None:
    metric, other = feed(GlobalLoss(TASKS), BATCHES[:1]), feed(GlobalLoss(TASKS), BATCHES[1:])
    assert list(metric.metric_state) == ["sums_of", "totals"]
    metric.merge_state(other.metric_state)
    assert numbers(metric.compute()) == pytest.approx(expected(BATCHES), rel=1e-15)
    view = metric.scalar("loss")
    metric.merge_state(other)
    assert view.compute().item() == pytest.approx(expected([*BATCHES, *BATCHES[1:]])["loss"], rel=1e-15)


@pytest.mark.skipif(IS_TORCHMETRICS_1_0, reason="torchmetrics 1.0.3 has no merge_state")
def test_the_state_of_a_view_is_not_merged() -> None:
    view, other = feed(GlobalLoss(TASKS)).scalar("loss"), feed(GlobalLoss(TASKS)).scalar("loss")
    assert view.metric_state == {}
    with pytest.raises(RuntimeError, match="merge_state"):
        view.merge_state(other)
    with pytest.raises(RuntimeError, match="merge_state"):
        view.merge_state({})


# Wrappers.


@pytest.mark.skipif(IS_TORCHMETRICS_1_0, reason="after forward(), torchmetrics 1.0.3 takes it for not updated")
def test_running_takes_a_loss_and_refuses_a_view() -> None:
    running = Running(GlobalLoss(TASKS), window=2)
    for last, batch in enumerate(BATCHES, start=1):
        now = running(*map(torch.tensor, batch))
        assert numbers(now) == pytest.approx(expected([batch]), rel=1e-15, nan_ok=True)
        assert numbers(running.compute()) == pytest.approx(expected(BATCHES[max(0, last - 2) : last]), rel=1e-15)
    with pytest.raises(ValueError, match="full_state_update"):
        Running(GlobalLoss(TASKS).scalar("loss"), window=2)


def test_min_max_takes_a_view() -> None:
    metric = MinMaxMetric(GlobalLoss(TASKS).scalar("loss/like"))
    values = [expected(BATCHES[:last])["loss/like"] for last in (1, 2, 3)]
    for batch, value in zip(BATCHES, values):
        metric.update(*map(torch.tensor, batch))
        assert metric.compute()["raw"].item() == pytest.approx(value, rel=1e-15)
    assert numbers(metric.compute()) == pytest.approx(
        {"raw": values[-1], "min": min(values), "max": max(values)}, rel=1e-15
    )


WRAPPED: dict[str, Callable[[], Any]] = {
    "a loss": lambda: GlobalLoss(None),
    "a view": lambda: GlobalLoss(None).scalar("loss"),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_multitask_takes_one_task_metrics_of_either_kind(make: Callable[[], Any]) -> None:
    prefix = "" if IS_TORCHMETRICS_1_0 else "val/"
    metric = MultitaskWrapper({task: make() for task in TASKS}, **({"prefix": prefix} if prefix else {}))
    for sums, weights in BATCHES:
        metric.update(dict(zip(TASKS, torch.tensor(sums))), dict(zip(TASKS, torch.tensor(weights))))
    found = metric.compute()
    for task in TASKS:
        value = found[f"{prefix}{task}"]
        value = value["loss"] if isinstance(value, dict) else value
        assert value.item() == pytest.approx(expected(BATCHES)[f"loss/{task}"], rel=1e-15)


def test_multioutput_takes_a_view_of_one_task() -> None:
    metric = MultioutputWrapper(GlobalLoss(None).scalar("loss"), num_outputs=2, remove_nans=False)
    for sums, weights in BATCHES:
        metric.update(torch.tensor([sums]), torch.tensor([weights]))
    oracle = expected(BATCHES)
    assert metric.compute().tolist() == pytest.approx([oracle["loss/like"], oracle["loss/reply"]], rel=1e-15)


def halved(sums: Tensor) -> Tensor:
    return sums / 2


@pytest.mark.skipif(IS_TORCHMETRICS_1_0, reason="torchmetrics 1.0.3 has no such wrapper")
@pytest.mark.parametrize("wrapped", ["loss", None])
def test_a_transformer_of_inputs_takes_either_kind(wrapped: str | None) -> None:
    owner = GlobalLoss(TASKS)
    metric = wrappers.LambdaInputTransformer(owner if wrapped is None else owner.scalar(wrapped), halved)
    found = numbers(feed(metric).compute())
    assert (found["loss"] if wrapped is None else found) == pytest.approx(expected(BATCHES)["loss"] / 2, rel=1e-15)


UNFIT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # It looks at one number.
    "min and max of a loss": (
        lambda: feed(MinMaxMetric(GlobalLoss(TASKS))).compute(),
        RuntimeError,
        r"scalar (tensor|\(int)",
    ),
    # It stacks tensors.
    "outputs of a loss": (
        lambda: feed(MultioutputWrapper(GlobalLoss(None), 2, output_dim=0, remove_nans=False)).compute(),
        TypeError,
        "got dict",
    ),
    # It goes through the classes of a vector.
    "classes of a view": (lambda: feed(ClasswiseWrapper(GlobalLoss(TASKS).scalar("loss"))).compute(), TypeError, "0-d"),
    # It draws rows anew, and here are sums of rows.
    "a bootstrap": (lambda: feed(BootStrapper(GlobalLoss(TASKS).scalar("loss"), 3)), ValueError, "loss_sum: got shape"),
}


@pytest.mark.parametrize(("use", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_wrappers_for_other_metrics_are_errors_and_no_wrong_numbers(
    use: Callable[[], Any], error: type[Exception], message: str
) -> None:
    torch.manual_seed(1)
    with pytest.raises(error, match=message):
        use()


# A loss in a collection, as training code has it.


def test_a_collection_can_hold_the_metric_that_a_loss_feeds() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS)
    collection = MetricCollection({"of train": loss.train_metric, "of eval": loss.eval_metric}, compute_groups=False)
    for mode in (True, False):
        loss.train(mode)
        loss(torch.zeros(3, 2), torch.ones(3, 2))
    found = numbers(compute_each(collection))
    assert found == {key: pytest.approx(math.log(2), rel=1e-6) for key in found}
    assert len(found) == 6
    twin = copy.deepcopy(collection)
    collection.reset()
    assert loss.train_metric.update_count == 0
    assert twin["of train"].update_count == 1


# Segments, which come as a keyword.


def test_a_collection_hands_the_ids_on_and_tells_other_segments_apart() -> None:
    """Of those with equal segments one is updated for all."""
    segments: list[Any] = [{"a": 2}, {"a": 2}, {"a": 3}, {"a": ["x", "y"]}, {"a": ["y", "x"]}]
    collection = MetricCollection({str(n): RankingQuality(TASKS, segments=each) for n, each in enumerate(segments)})
    alone = [RankingQuality(TASKS, segments=each) for each in segments]
    for seed in range(3):
        batch, ids = random_rows(7, seed, tasks=2)[:2], {"a": torch.arange(7) % 4 - 1}
        for metric in alone:
            metric.update(*batch, segments=ids)
        (collection if seed == 2 else collection.update)(*batch, segments=ids)
    found = numbers(compute_each(collection))
    for name, metric in enumerate(alone):
        own = {key: value for key, value in found.items() if key.startswith(f"{name}_")}
        assert own == pytest.approx({f"{name}_{key}": x for key, x in numbers(metric.compute()).items()}, nan_ok=True)
    assert sorted(map(len, collection.compute_groups.values())) == [1, 1, 1, 2]


def test_trackers_views_and_wrappers_hand_the_ids_on() -> None:
    ids, key = {"a": torch.arange(7) % 2}, "weight/like/a=other"
    tracker = MetricTracker(RankingQuality(TASKS, segments={"a": 1}), maximize=False)
    view = RankingQuality(TASKS, segments={"a": 1}).scalar(key)
    running = Running(RankingQuality(TASKS, segments={"a": 1}), window=2)
    for seed in range(3):
        batch = random_rows(7, seed, tasks=2)[:2]
        tracker.increment()
        for each in (tracker, view, running):
            each.update(*batch, segments=ids)
    assert tracker.compute_all()[key].tolist() == [3.0] * 3
    assert view.compute().item() == 9.0
    assert running.compute()[key].item() == 6.0
