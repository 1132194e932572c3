"""Single keys of a RankingQuality as metrics of their own: which values are better, and those of the window."""

from __future__ import annotations

import pytest
from torchmetrics import MetricTracker

from tests.support.quality_batches import TASKS, expected, random_rows
from tests.support.results import fed
from twloss import RankingQuality

BATCHES = [random_rows(5 + step, step, weighted=True) for step in range(6)]


def test_which_keys_are_better_high() -> None:
    metric = RankingQuality(TASKS, window=2)
    better = {"ne": False, "logloss": False, "rce": True, "calibration": None, "ctr": None, "weight": None}
    for key in metric.keys():  # noqa: SIM118 (not a mapping)
        assert metric.scalar(key).higher_is_better is better[key.removeprefix("window_").partition("/")[0]]
    assert RankingQuality(None).scalar("rce").higher_is_better is True


def test_a_view_of_the_window_that_starts_anew_still_has_the_last_updates() -> None:
    """No rows came since, but the window is not empty: nothing to warn of."""
    metric = fed(RankingQuality(TASKS, window=2), BATCHES)
    view = metric.scalar("window_ne/like")
    view.reset()
    assert view.compute().item() == pytest.approx(expected(BATCHES[-2:])["ne/like"], rel=1e-12)


def test_a_tracker_finds_the_highest_relative_cross_entropy() -> None:
    tracker, batches = MetricTracker(RankingQuality(TASKS).scalar("rce/like")), [random_rows(60, s) for s in range(5)]
    for batch in batches:
        tracker.increment()
        tracker.update(*batch)
    by_step = [expected([batch])["rce/like"] for batch in batches]
    assert tracker.maximize is True
    assert tracker.compute_all().tolist() == pytest.approx(by_step, rel=1e-11)
    best = max(by_step)
    assert tracker.best_metric(return_step=True) == (pytest.approx(best, rel=1e-11), by_step.index(best))
