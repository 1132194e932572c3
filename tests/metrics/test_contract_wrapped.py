"""What every metric promises inside of torchmetrics' collections and trackers, and of the views of its single keys."""

from __future__ import annotations

import copy

import pytest
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.support.metrics import Batch, Kind, of_every_kind
from tests.support.results import IS_TORCHMETRICS_1_0, assert_close, compute_each, fed, numbers

# A view's result since its reset is the difference of two sums.
OF_A_DIFFERENCE = 1e-11


def named(result: dict[str, float], prefix: str = "", postfix: str = "") -> dict[str, float]:
    """A result as a collection names it."""
    return {f"{prefix}{key}{postfix}": value for key, value in result.items()}


@of_every_kind
def test_a_collection_has_the_keys_under_its_prefix_and_postfix(kind: Kind) -> None:
    batches = kind.batches(4)
    collection = MetricCollection(kind.make(), prefix="val/", postfix="/all")
    for batch in batches[:3]:
        collection.update(*batch)
    assert_close(numbers(collection.compute()), named(kind.expected(batches[:3]), "val/", "/all"))
    clone = collection.clone(prefix="test/")
    collection.reset()
    assert_close(numbers(clone.compute()), named(kind.expected(batches[:3]), "test/", "/all"))
    assert_close(numbers(collection(*batches[3])), named(kind.expected(batches[3:]), "val/", "/all"))
    assert_close(numbers(collection.compute()), named(kind.expected(batches[3:]), "val/", "/all"))


@of_every_kind
@pytest.mark.parametrize("compute_groups", [True, False])
def test_two_in_a_collection_count_each_batch_once(kind: Kind, compute_groups: bool) -> None:
    """As one compute group, which shares one state, they must not both add to it; forward comes after update, too."""
    batches = kind.batches(4)
    collection = MetricCollection({"a": kind.make(), "b": kind.make()}, compute_groups=compute_groups)
    for _ in range(2):
        for batch in batches[:3]:
            collection.update(*batch)
        collection(*batches[3])
        found = numbers(compute_each(collection))
        for name in ("a", "b"):
            assert_close(
                {k: v for k, v in found.items() if k.startswith(name)}, named(kind.expected(batches), f"{name}_")
            )
        collection.reset()
    assert any(len(group) == 2 for group in collection.compute_groups.values()) == compute_groups


@of_every_kind
def test_a_tracker_has_every_key_of_every_step(kind: Kind) -> None:
    tracker = MetricTracker(kind.make(), maximize=False)
    for step in range(3):
        tracker.increment()
        for batch in steps(kind)[step]:
            tracker.update(*batch)
    stacked = tracker.compute_all()
    for step, batches in enumerate(steps(kind)):
        assert_close({key: values[step].item() for key, values in stacked.items()}, kind.expected(batches))


def steps(kind: Kind) -> list[list[Batch]]:
    """The batches of three steps."""
    return [[kind.batch(10 * step, rows=6), kind.batch(10 * step + 1, rows=5)] for step in range(3)]


@of_every_kind
def test_a_tracker_finds_the_best_step_through_a_view(kind: Kind) -> None:
    """Of the first key; it is a loss, or a normalised entropy, of which less is better."""
    key = kind.make().keys()[0]
    # torchmetrics 1.0.3 does not ask which is better.
    tracker = MetricTracker(kind.make().scalar(key), **({"maximize": False} if IS_TORCHMETRICS_1_0 else {}))
    for step in range(3):
        tracker.increment()
        for batch in steps(kind)[step]:
            tracker.update(*batch)
    oracle = [kind.expected(batches)[key] for batches in steps(kind)]
    assert tracker.maximize is False
    assert tracker.compute_all().tolist() == pytest.approx(oracle, rel=1e-12)
    best = pytest.approx(min(oracle), rel=1e-12)
    assert tracker.best_metric(return_step=True) == (best, oracle.index(min(oracle)))
    assert list(tracker.state_dict()) == []


# Views of single keys.


@of_every_kind
def test_a_view_of_each_key_gives_its_value_and_counts_from_its_own_reset(kind: Kind) -> None:
    before, after = kind.batches(3), kind.batches(3, seed=3)
    metric = kind.make()
    views = {key: metric.scalar(key) for key in metric.keys()}  # noqa: SIM118 (not a mapping)
    fed(metric, before)
    assert_close(numbers({key: view.compute() for key, view in views.items()}), kind.expected(before))
    for view in views.values():
        view.reset()
    fed(metric, after)
    oracle = kind.expected(after)
    assert_close(numbers({key: view.compute() for key, view in views.items()}), oracle, OF_A_DIFFERENCE)
    assert_close(numbers(metric.compute()), kind.expected([*before, *after]))
    metric.reset()
    fed(metric, before)
    assert_close(numbers({key: view.compute() for key, view in views.items()}), kind.expected(before))


@of_every_kind
def test_a_view_feeds_its_metric_and_forward_gives_the_value_of_the_batch(kind: Kind) -> None:
    metric, batches = kind.make(), kind.batches(3)
    key = metric.keys()[-1]
    view = metric.scalar(key)
    view.update(*batches[0])
    for batch in batches[1:]:
        assert view(*batch).item() == pytest.approx(kind.expected([batch])[key], rel=1e-12)
    assert_close(numbers(metric.compute()), kind.expected(batches))
    assert (view.update_count, view.update_called, view.device) == (3, True, metric.device)


@of_every_kind
def test_between_sync_and_unsync_no_view_starts_anew_and_one_that_did_is_not_read(kind: Kind) -> None:
    """Without a reset it reads what is synced; there, this rank's own sums are not at hand."""
    batches = kind.batches(3)
    metric = fed(kind.make(distributed_available_fn=lambda: True), batches[:2])
    key = metric.keys()[0]
    whole, late = metric.scalar(key), metric.scalar(key)
    late.reset()
    metric.sync()
    assert whole.compute().item() == pytest.approx(kind.expected(batches[:2])[key], rel=1e-12)
    for call in (late.compute, late.reset, whole.reset):
        with pytest.raises(TorchMetricsUserError, match=r"between sync\(\) and unsync\(\)"):
            call()
    metric.unsync()
    metric.update(*batches[2])
    assert late.compute().item() == pytest.approx(kind.expected(batches[2:])[key], rel=OF_A_DIFFERENCE)
    assert metric.update_count == 3


@of_every_kind
def test_a_copy_of_a_view_has_a_metric_of_its_own(kind: Kind) -> None:
    metric, batches = fed(kind.make(), kind.batches(2)), kind.batches(4)
    view = metric.scalar(metric.keys()[0])
    twin = copy.deepcopy(view)
    fed(twin, batches[2:])
    assert (view.update_count, twin.update_count) == (2, 4)
    assert_close(numbers(metric.compute()), kind.expected(batches[:2]))


@of_every_kind
@pytest.mark.parametrize("key", ["", "loss/x", "ne/x", "like"])
def test_a_view_of_an_unknown_key_is_refused_with_the_known_ones(kind: Kind, key: str) -> None:
    metric = kind.make()
    with pytest.raises(ValueError, match=rf"key: got '{key}', expected one of \['{metric.keys()[0]}'"):
        metric.scalar(key)
    with pytest.raises(TypeError, match=rf"key: got int, expected one of \['{metric.keys()[0]}'"):
        metric.scalar(0)  # type: ignore[arg-type]
