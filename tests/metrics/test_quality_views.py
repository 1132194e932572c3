"""Single keys of a RankingQuality as metrics of their own, in trackers and collections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torchmetrics import MetricCollection, MetricTracker

from tests.support.quality_batches import TASKS, expected, random_rows, recent
from tests.support.results import assert_close, fed, numbers
from twloss import RankingQuality
from twloss.scalar_view import ScalarView

BATCHES = [random_rows(5 + step, step, weighted=True) for step in range(6)]


def test_which_keys_are_better_high() -> None:
    metric = RankingQuality(TASKS, window=2)
    better = {"ne": False, "logloss": False, "rce": True, "calibration": None, "ctr": None, "weight": None}
    for key in metric.keys():  # noqa: SIM118 (not a mapping)
        assert metric.better(key) is better[key.removeprefix("window_").partition("/")[0]]
        assert metric.scalar(key).higher_is_better is metric.better(key)
    assert RankingQuality(None).scalar("rce").higher_is_better is True


def test_a_view_is_one_value_and_starts_anew_by_itself() -> None:
    metric = RankingQuality(TASKS, window=2)
    view, other = metric.scalar("ne/like"), metric.scalar("window_calibration/reply")
    assert isinstance(view, ScalarView)
    fed(metric, BATCHES[:2])
    assert view.compute().item() == pytest.approx(expected(BATCHES[:2])["ne/like"], rel=1e-12)
    view.reset()
    other.reset()
    fed(metric, BATCHES[2:5])
    assert view.compute().item() == pytest.approx(expected(BATCHES[2:5])["ne/like"], rel=1e-11)
    # The window is of the last updates, whatever came before.
    assert other.compute().item() == pytest.approx(expected(BATCHES[3:5])["calibration/reply"], rel=1e-12)
    assert_close(recent(numbers(metric.compute()), window=False), expected(BATCHES[:5]))
    with pytest.raises(ValueError, match="key: got 'ne/x'"):
        metric.scalar("ne/x")


def test_a_view_of_the_window_that_starts_anew_still_has_the_last_updates() -> None:
    """No rows came since, but the window is not empty: nothing to warn of."""
    metric = fed(RankingQuality(TASKS, window=2), BATCHES)
    view = metric.scalar("window_ne/like")
    view.reset()
    assert view.compute().item() == pytest.approx(expected(BATCHES[-2:])["ne/like"], rel=1e-12)


@pytest.mark.parametrize(("key", "pick"), [("rce/like", max), ("ne/like", min)])
def test_a_tracker_finds_the_best_step(key: str, pick: Callable[[list[float]], float]) -> None:
    tracker, batches = MetricTracker(RankingQuality(TASKS).scalar(key)), [random_rows(60, seed) for seed in range(5)]
    for batch in batches:
        tracker.increment()
        tracker.update(*batch)
    by_step = [expected([batch])[key] for batch in batches]
    best = pick(by_step)
    assert tracker.compute_all().tolist() == pytest.approx(by_step, rel=1e-11)
    assert tracker.best_metric(return_step=True) == (pytest.approx(best, rel=1e-11), by_step.index(best))


def test_a_collection_flattens_the_keys() -> None:
    collection = MetricCollection(RankingQuality(TASKS), prefix="val/")
    for batch in BATCHES:
        collection.update(*batch)
    oracle = {f"val/{key}": value for key, value in expected(BATCHES).items()}
    assert numbers(collection.compute()) == pytest.approx(oracle, rel=1e-11)
