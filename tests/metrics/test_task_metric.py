"""A metric of one's own: four methods, and all that the package's metrics promise holds for it too."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.rank_pool import RankPool
from tests.support.results import fed, numbers
from twloss import TaskMetric, global_sums

TASKS = ["price", "stars"]


class SquaredError(TaskMetric):
    """The mean squared error of each task; what tests change is given to it."""

    made = 0  # how often the keys were

    def __init__(self, tasks: Sequence[str], *, sums: int = 2, given: int = 0, values: int = 0, **options: Any) -> None:
        super().__init__(tasks, sums, **options)
        self.given, self.values = given, values

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch's rows."""
        self._add(self._sum_batch(predictions, targets))

    def _sum_batch(self, predictions: Tensor, targets: Tensor) -> Sequence[Tensor | float]:
        rows = [len(targets)] * (1 if self.window_rows is None else 2)
        return [(predictions - targets).square().sum(0), *rows, *[0.0] * self.given]

    def _keys(self) -> dict[str, bool | None]:
        self.made += 1
        assert self.tasks is not None
        return {f"mse/{task}": False for task in self.tasks}

    def _results(self, sums: Tensor) -> Sequence[Tensor]:
        return [*(sums[0] / sums[1]), *[sums.sum()] * self.values]


def batch(seed: int, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = torch.rand(2, rows, len(TASKS), dtype=torch.float64, generator=generator)
    return predictions, targets


def expected(seeds: Sequence[int]) -> dict[str, float]:
    """By loops over the rows."""
    errors: dict[str, list[float]] = {task: [] for task in TASKS}
    for seed in seeds:
        for predicted, target in zip(*(part.tolist() for part in batch(seed))):
            for task, x, y in zip(TASKS, predicted, target):
                errors[task].append((x - y) ** 2)
    return {f"mse/{task}": math.fsum(each) / len(each) for task, each in errors.items()}


def test_all_else_is_there() -> None:
    metric = fed(SquaredError(TASKS), map(batch, range(4)))
    assert numbers(metric.compute()) == pytest.approx(expected(range(4)))
    assert numbers(metric(*batch(4))) == pytest.approx(expected([4]))
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.half()):
        assert numbers(twin.compute()) == pytest.approx(expected(range(5)))
    view = metric.scalar("mse/price")
    view.reset()
    fed(metric, map(batch, [5, 6]))
    assert view.compute().item() == pytest.approx(expected([5, 6])["mse/price"])
    assert view.higher_is_better is False
    metric.merge_state(fed(SquaredError(TASKS), map(batch, [7])))
    assert numbers(metric.compute_async().wait()) == pytest.approx(expected(range(8)))


def test_a_window_of_updates_or_of_rows() -> None:
    for options in ({"window": 2}, {"window_rows": 10}):
        metric = fed(SquaredError(TASKS, **options), map(batch, range(4)))
        window = {f"window_{key}": value for key, value in expected([2, 3]).items()}
        assert numbers(metric.compute()) == pytest.approx({**expected(range(4)), **window})


def on_a_rank(rank: int) -> tuple[dict[str, float], dict[str, float]]:
    metric = fed(SquaredError(TASKS), map(batch, range(3) if rank else [3]))
    metric.persistent(True)
    with global_sums(metric):
        saved = metric.state_dict()
    resumed = SquaredError(TASKS)
    resumed.persistent(True)
    resumed.load_state_dict(saved)
    return numbers(metric.compute()), numbers(fed(resumed, map(batch, [4] if rank else [])).compute())


def test_over_ranks_and_from_a_checkpoint(two_ranks: RankPool) -> None:
    for computed, resumed in two_ranks.run(on_a_rank):
        assert computed == pytest.approx(expected(range(4)))
        assert resumed == pytest.approx(expected(range(5)))


def test_keys_are_made_once() -> None:
    metric = fed(SquaredError(TASKS), map(batch, range(2)))
    for _ in range(3):
        metric.compute()
        metric.keys()
    metric(*batch(1))
    assert metric.made == 1


def test_a_state_of_its_own_is_refused_and_the_way_that_works_is_told() -> None:
    metric = SquaredError(TASKS)
    with pytest.raises(
        TypeError, match=r"add_state: got 'rows', expected one more sum from _sum_batch\(\), with sums="
    ):
        metric.add_state("rows", torch.zeros(1), dist_reduce_fx="sum")
    assert not hasattr(metric, "rows")
    assert set(metric.metric_state) == {"totals", "sums_of"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": 2}, "_sum_batch: got 4 sums, expected 2"),
        ({"sums": 4}, "_sum_batch: got 2 sums, expected 4"),
        ({"given": -1, "sums": 3, "window_rows": 5}, "_sum_batch: got 3 sums, expected 3, and the number of rows"),
        ({"given": 1, "window_rows": 5}, "_sum_batch: got 4 sums, expected 2, and the number of rows"),
    ],
)
def test_a_wrong_number_of_sums_is_told(options: dict[str, Any], message: str) -> None:
    metric = SquaredError(TASKS, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        metric.update(*batch(0))
    assert metric.update_count == 0


def test_a_wrong_number_of_values_is_told() -> None:
    metric = fed(SquaredError(TASKS, values=1, window=3), map(batch, [0]))
    with pytest.raises(ValueError, match=r"_results: got 3 values, expected 2, one for each of _keys\(\)"):
        metric.compute()


@pytest.mark.parametrize("other", [{"nan_strategy": "ignore"}, {"settings": {"unit": "s"}}, {"rule": {"unit": "s"}}])
def test_the_first_state_tells_metrics_apart(other: dict[str, Any]) -> None:
    """No other is compared by torchmetrics 1.0.3, where a collection looks for metrics that are one."""
    states: list[Any] = [next(iter(SquaredError(TASKS, **each)._defaults.values())) for each in ({}, {}, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_sums_by_another_rule_are_not_merged() -> None:
    metric, other = (SquaredError(TASKS, rule={"squared": squared}) for squared in (True, False))
    with pytest.raises(ValueError, match="squared=False"):
        metric.merge_state(other)


class AbsoluteError(SquaredError):
    """Other sums under the same names and of the same shape."""

    def _sum_batch(self, predictions: Tensor, targets: Tensor) -> Sequence[Tensor | float]:
        return (predictions - targets).abs().sum(0), len(targets)


def in_a_function() -> type[SquaredError]:
    """A class that another function, too, may have under its name."""

    class AbsoluteError(SquaredError):
        pass

    return AbsoluteError


def refused(pair: Sequence[SquaredError], message: str) -> None:
    """The one takes the other's sums neither by a merge nor by a load."""
    metric, other = pair
    before = metric.totals.clone()
    for each in (metric, other):
        each.persistent(True)
    for incoming in (other, other.metric_state):
        with pytest.raises(ValueError, match="incoming_state: got") as caught:
            metric.merge_state(incoming)
    assert message in str(caught.value)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        metric.load_state_dict(other.state_dict())
    assert torch.equal(metric.totals, before)


def test_sums_of_another_class_are_neither_loaded_nor_merged() -> None:
    kinds: list[type[SquaredError]] = [SquaredError, AbsoluteError, in_a_function()]
    for kind in kinds:
        for other in kinds:
            if kind is not other:
                pair = [fed(each(TASKS), [batch(0)]) for each in (kind, other)]
                refused(pair, f"got sums of class='{other.__qualname__}', expected class='{kind.__qualname__}'")


def taken(metric: SquaredError, other: SquaredError) -> None:
    """Both are fed alike; the one merges the other's sums, and loads them."""
    once = metric.totals.clone()
    for each in (metric, other):
        each.persistent(True)
    metric.merge_state(other.metric_state)
    assert torch.equal(metric.totals, 2 * once)
    metric.load_state_dict(other.state_dict())
    assert torch.equal(metric.totals.sum(0), once.sum(0))


def test_a_class_that_moves_to_another_file_has_the_same_sums() -> None:
    moved: Any = type("SquaredError", (SquaredError,), {"__module__": "another.file", "__qualname__": "SquaredError"})
    taken(fed(moved(TASKS), [batch(0)]), fed(SquaredError(TASKS), [batch(0)]))


def test_a_rule_that_one_of_two_lacks_is_another_rule() -> None:
    for value in (3, None):
        pair = [fed(SquaredError(TASKS, rule=rule), [batch(0)]) for rule in ({"limit": value}, {})]
        refused(pair, f"got sums of no limit, expected limit={value}")
        refused(pair[::-1], f"got sums of limit={value}, expected no limit")


@pytest.mark.parametrize("value", [(0.5, 1.5), [math.nan], math.nan, {"a": (1, 2)}, {1: 2}, 30, None, True])
def test_a_rule_may_be_anything_that_json_has(value: Any) -> None:
    taken(*[fed(SquaredError(TASKS, rule={"limits": value}), [batch(0)]) for _ in range(2)])


@pytest.mark.parametrize("name", ["class", "tasks", "window", "window_rows", "shape", "settings", "*"])
def test_a_rule_can_not_contradict_what_is_known_of_all_sums(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^rule: got \['{re.escape(name)}'\], expected other names"):
        SquaredError(TASKS, rule={"limit": 3, name: None})


def test_without_its_methods_nothing_is_computed() -> None:
    class Nothing(TaskMetric):
        def update(self) -> None:
            """Add nothing."""

    with pytest.raises(NotImplementedError):
        Nothing(TASKS, 1).keys()
