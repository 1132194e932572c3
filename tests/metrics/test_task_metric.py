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


@pytest.mark.parametrize("name", ["class", "tasks", "window", "window_rows", "segments", "shape", "settings", "*"])
def test_a_rule_can_not_contradict_what_is_known_of_all_sums(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^rule: got \['{re.escape(name)}'\], expected other names"):
        SquaredError(TASKS, rule={"limit": 3, name: None})


def test_without_its_methods_nothing_is_computed() -> None:
    class Nothing(TaskMetric):
        def update(self) -> None:
            """Add nothing."""

    with pytest.raises(NotImplementedError):
        Nothing(TASKS, 1).keys()


# By segments.

SEGMENTS: dict[str, Any] = {"country": ["DE", "US"], "surface": 2}
CELLS = ["country=DE", "country=US", "country=other", "surface=0", "surface=1", "surface=other"]


class ErrorBySegments(TaskMetric):
    """The mean squared error, as ``SquaredError``, of whatever is told apart."""

    def __init__(self, tasks: Sequence[str], **options: Any) -> None:
        super().__init__(tasks, 2, **options)

    def update(self, predictions: Tensor, targets: Tensor, *, segments: Any = None) -> None:
        """Add a batch's rows."""
        self._add(self._sum_batch(predictions, targets, segments=segments))

    def _sum_batch(self, predictions: Tensor, targets: Tensor, *, segments: Any = None) -> Any:
        errors = (predictions - targets).square()
        return self._sum_rows([errors, torch.ones_like(errors)], segments)

    def _keys(self) -> dict[str, bool | None]:
        assert self.tasks is not None
        return dict.fromkeys(self._columns([f"mse/{task}" for task in self.tasks]), False)

    def _results(self, sums: Tensor) -> Sequence[Tensor]:
        return (sums[0] / sums[1]).unbind()


def ids(rows: int) -> dict[str, Tensor]:
    """Each id, and some outside, one a row and one a row and task."""
    return {"country": torch.arange(rows) % 4 - 1, "surface": torch.arange(2 * rows).view(rows, 2) % 5 - 1}


def cells(row: int, task: int) -> list[str]:
    country, surface = row % 4 - 1, (2 * row + task) % 5 - 1
    named = {0: "DE", 1: "US"}.get(country, "other"), {0: "0", 1: "1"}.get(surface, "other")
    return [f"country={named[0]}", f"surface={named[1]}"]


def expected_by_cell(seeds: Sequence[int], rows: int) -> dict[str, float]:
    errors: dict[str, list[float]] = {
        f"mse/{task}{cell}": [] for cell in ("", *("/" + c for c in CELLS)) for task in TASKS
    }
    for seed in seeds:
        for row, (predicted, target) in enumerate(zip(*(part.tolist() for part in batch(seed, rows)))):
            for task, x, y in zip(TASKS, predicted, target):
                for cell in ("", *("/" + c for c in cells(row, TASKS.index(task)))):
                    errors[f"mse/{task}{cell}"].append((x - y) ** 2)
    return {key: math.fsum(each) / len(each) for key, each in errors.items()}


def test_segments_are_more_keys_of_a_metric_of_ones_own() -> None:
    metric = ErrorBySegments(TASKS, segments=SEGMENTS)
    for seed in range(3):
        metric.update(*batch(seed, 9), segments=ids(9))
    oracle = expected_by_cell(range(3), 9)
    assert metric.keys() == [*oracle]
    assert numbers(metric.compute()) == pytest.approx(oracle)
    assert numbers(metric(*batch(7, 20), segments=ids(20))) == pytest.approx(expected_by_cell([7], 20))
    view = metric.scalar("mse/stars/surface=1")
    view.reset()
    metric.update(*batch(8, 9), segments=ids(9))
    assert view.compute().item() == pytest.approx(expected_by_cell([8], 9)["mse/stars/surface=1"])
    assert view.higher_is_better is False
    mapped = ErrorBySegments(TASKS, segments=SEGMENTS)
    by_task = dict(zip(TASKS, ids(9)["surface"].unbind(1)))
    mapped.update(*batch(0, 9), segments={**ids(9), "surface": by_task})
    assert numbers(mapped.compute()) == pytest.approx(expected_by_cell([0], 9))


def test_without_segments_sums_of_rows_are_those_of_tasks() -> None:
    metric = ErrorBySegments(TASKS)
    assert [each.shape for each in metric._sum_batch(*batch(0))] == [(2,), (2,)]
    assert numbers(fed(metric, map(batch, range(3))).compute()) == pytest.approx(expected(range(3)))
    with pytest.raises(ValueError, match=r"^segments: got ids, expected None, as this was made with segments=None$"):
        metric.update(*batch(0), segments=ids(5))
    assert metric.update_count == 3


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ([torch.ones(2), torch.ones(2)], r"got shape \(2,\), expected \(7, 2\), \(1 \+ cells, tasks\)"),
        ([torch.ones(7, 2), torch.ones(7, 1)], r"got shape \(7, 1\), expected \(7, 2\)"),
        ([torch.ones(7, 2), 3], r"got int, expected \(7, 2\)"),
        ([3.0, torch.ones(7, 2)], r"got float, expected \(7, 2\)"),
        ([torch.ones(7, 2)], "got 1 sums, expected 2"),
    ],
)
def test_sums_that_do_not_fit_the_cells_are_one_clear_error(sums: Any, message: str) -> None:
    class Unfit(ErrorBySegments):
        def _sum_batch(self, *_: Any, **__: Any) -> Any:
            return sums

    metric = Unfit(TASKS, segments=SEGMENTS)
    for call in (metric.update, metric):
        with pytest.raises(ValueError, match=rf"^_sum_batch: {message}"):
            call(*batch(0))
    assert metric.update_count == 0


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ([torch.ones(1), 3], r"got shape \(1,\), expected \(2,\), \(tasks,\)"),
        ([torch.ones(2), torch.ones(())], r"got shape \(\), expected \(2,\)"),
        ([torch.ones(2, 2), 3], r"got shape \(2, 2\), expected \(2,\)"),
        ([3.0, torch.ones(2)], r"got float, expected \(2,\)"),
    ],
)
def test_sums_that_do_not_fit_the_tasks_are_one_clear_error(sums: Any, message: str) -> None:
    class OtherError(SquaredError):
        def _sum_batch(self, *_: Any) -> Any:
            return sums

    with pytest.raises(ValueError, match=rf"^_sum_batch: {message}"):
        OtherError(TASKS).update(*batch(0))


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (5, 2, 1)])
def test_rows_of_another_shape_are_one_clear_error(segments: Any, shape: tuple[int, ...]) -> None:
    metric = ErrorBySegments(TASKS, segments=segments)
    with pytest.raises(ValueError, match=r"^_sum_rows: got shape .*, expected \((5|rows), 2\), \(rows, tasks\)$"):
        metric.update(torch.ones(shape), torch.zeros(shape), segments=segments and ids(5))
