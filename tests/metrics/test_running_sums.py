"""Running sums: their algebra, and their format in a state: float64, or a pair of float32 on a device without it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support import reference
from tests.support.cases import Ranker, Settings, columns, random_rows
from tests.support.metrics import numbers_of_this_rank
from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, MultiTaskLoss, _precision
from twloss._sums.running_sums import RunningSums, SumsFormat

CPU = torch.device("cpu")


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device without float64."""
    monkeypatch.setattr(_precision, "DEVICES_WITHOUT_FLOAT64", {"mps", "cpu"})


def added(values: Tensor) -> tuple[SumsFormat, Tensor]:
    """The state of one sum a task, after an update with each row of the values ``(updates, tasks)``."""
    layout = SumsFormat(1, values.shape[1])
    state = layout.zeros(CPU)
    for each in values:
        layout.add(state, layout.pack([each], drops_non_finite=False))
    return layout, state


def summed(values: list[float]) -> float:
    """The running sum of one task, in float64."""
    layout, state = added(torch.tensor(values).unsqueeze(1))
    return sums_of(layout, layout.read(state))[0, 0, 0].item()


def sums_of(layout: SumsFormat, value: RunningSums) -> Tensor:
    """The sums of one process ``(horizons, sums, tasks)``."""
    return layout.split(value.of_rank(0))[0]


@pytest.mark.usefixtures("pairs")
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("smallest", "tolerance"),
    # Sums of 1024 rows as float32 gives them: at losses from 1/8 to 3/4, whose sum has no more than 48 bits, so that
    # nothing is rounded, and at losses down to a millionth, where each update rounds the sum to 48 bits.
    [(0.5, 2**-53), (1e-6, 50_000 * 2**-48)],
)
def test_after_a_million_updates_a_pair_goes_on_to_48_bits(smallest: float, tolerance: float) -> None:
    batches = 512 * (0.5 + torch.rand(50_000, 2)) * smallest ** torch.rand(50_000, 2)
    batches = torch.cat((torch.full((1, 2), 512e6), batches))
    layout, state = added(batches)
    assert state.dtype == torch.float32
    for value, column in zip(sums_of(layout, layout.read(state)).flatten().tolist(), batches.T.tolist()):
        assert value == pytest.approx(math.fsum(column), rel=tolerance)


@pytest.mark.usefixtures("pairs")
@given(st.lists(st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=50))
def test_a_pair_is_within_48_bits_of_the_exact_sum(values: list[float]) -> None:
    exact = sum(map(Fraction, values))
    bound = Fraction(2) ** -46 * len(values) * max(abs(Fraction(value)) for value in values) * len(values)
    assert abs(Fraction(summed(values)) - exact) <= bound


@pytest.mark.usefixtures("pairs")
def test_a_plain_float32_sum_stops_where_a_pair_goes_on() -> None:
    start, step = torch.tensor([2.0**24]), torch.ones(1)
    assert summed([start.item()] + [1.0] * 1000) == 2**24 + 1000
    assert sum([step] * 1000, start).item() == 2**24


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    assert summed([1.0, bad, 1.0]) == pytest.approx(bad, nan_ok=True)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("reduction", ["mean", "median"])
def test_losses_are_those_of_the_oracle_to_float32_and_the_sums_exact(reduction: str) -> None:
    case = Settings(global_reduction=reduction, ignore_index=-1.0, mean_over="weights", task_weights=[1.0, 2.0, 0.5])
    rows = random_rows(case, 40, 1, weighted=True)
    loss = case.loss()
    ranker = Ranker(loss, case.tasks, torch.float32)
    for part in rows.to(torch.float32).cut([10, 0, 30]):
        ranker(part)["loss"].backward()
    assert loss.train_metric.totals.dtype == torch.float32
    result = loss.train_metric.compute()
    expected = reference.losses(columns(case, rows), case.rule())
    assert {key: value.item() for key, value in result.items()} == pytest.approx(expected, rel=1e-5)
    assert all(value.dtype == torch.float64 for value in result.values())


def test_sums_move_between_the_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = GlobalLoss(["a"])
    metric.update(torch.tensor([1e8 + 1 / 3], dtype=torch.float64), 3)
    exact = metric.compute()["loss"].item()
    monkeypatch.setattr(_precision, "DEVICES_WITHOUT_FLOAT64", {"cpu"})
    metric.totals = metric._format.move(metric.totals, CPU)
    assert metric.totals.dtype == torch.float32
    assert metric.compute()["loss"].item() == pytest.approx(exact, rel=2**-46)
    metric.reset()
    metric.persistent(True)
    metric.update(torch.tensor([0.1]), 3)
    state = metric.state_dict()
    monkeypatch.setattr(_precision, "DEVICES_WITHOUT_FLOAT64", set())
    fresh = GlobalLoss(["a"])
    fresh.persistent(True)
    fresh.load_state_dict(state)
    assert torch.equal(fresh._read().of_rank(0), metric._read().of_rank(0))
    assert fresh.compute()["loss"].item() == metric.compute()["loss"].item()


def sync_pairs(rank: int) -> tuple[float, float]:
    _precision.DEVICES_WITHOUT_FLOAT64.add("cpu")
    try:
        loss = MultiTaskLoss("bce_with_logits", ["a"])
        loss.train_metric.update(torch.tensor([2.0**24 if rank else 1.0]), 1)
        merged = GlobalLoss(["a"], "sum")
        merged.merge_state(loss.train_metric)
        merged.merge_state(loss.train_metric)
        return loss.train_metric.compute()["loss"].item(), numbers_of_this_rank(merged)["loss"]
    finally:
        _precision.DEVICES_WITHOUT_FLOAT64.discard("cpu")


def test_pairs_are_summed_over_ranks_in_float64(two_ranks: RankPool) -> None:
    values = two_ranks.run(sync_pairs)
    assert [value for value, _ in values] == [(2**24 + 1) / 2] * 2
    assert [merged for _, merged in values] == [2.0, 2.0**25]
