"""Running sums: their algebra, and their format in a state: float64, or a pair of float32 on a device without it."""

from __future__ import annotations

import ast
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support import reference
from tests.support.cases import Ranker, Settings, columns, random_rows
from tests.support.metrics import numbers_of_this_rank
from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, MultiTaskLoss, RankingQuality, _precision
from twloss._sums.running_sums import RunningSums, SumsFormat

CPU = torch.device("cpu")


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device without float64."""
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)


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
def test_what_a_pair_can_not_hold_is_infinite_and_not_nan() -> None:
    """As float32 has it, whether it is written or added."""
    values = torch.tensor([math.inf, -math.inf, 1e300, -1e300], dtype=torch.float64)
    expected = [math.inf, -math.inf, math.inf, -math.inf]
    layout = SumsFormat(1, 4)
    written = layout.write(RunningSums.own(values.expand(1, 3, 4)), CPU)
    assert written.dtype == torch.float32
    assert sums_of(layout, layout.read(written)).flatten().tolist() == expected
    state = layout.zeros(CPU)
    for _ in range(2):
        layout.add(state, values.expand(3, 4))
    assert sums_of(layout, layout.read(state)).flatten().tolist() == expected


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
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)
    metric.totals = metric._format.move(metric.totals, CPU)
    assert metric.totals.dtype == torch.float32
    assert metric.compute()["loss"].item() == pytest.approx(exact, rel=2**-46)
    metric.reset()
    metric.persistent(True)
    metric.update(torch.tensor([0.1]), 3)
    state = metric.state_dict()
    monkeypatch.delitem(_precision.SUM_DTYPES, "cpu")
    fresh = GlobalLoss(["a"])
    fresh.persistent(True)
    fresh.load_state_dict(state)
    assert torch.equal(fresh._read().of_rank(0), metric._read().of_rank(0))
    assert fresh.compute()["loss"].item() == metric.compute()["loss"].item()


def sync_pairs(rank: int) -> tuple[float, float]:
    _precision.SUM_DTYPES["cpu"] = torch.float32
    try:
        loss = MultiTaskLoss("bce_with_logits", ["a"])
        loss.train_metric.update(torch.tensor([2.0**24 if rank else 1.0]), 1)
        total, merged = GlobalLoss(["a"], "sum"), GlobalLoss(["a"], "sum")
        total.update(torch.tensor([2.0**24 if rank else 1.0]), 1)
        merged.merge_state(total)
        merged.merge_state(total)
        return loss.train_metric.compute()["loss"].item(), numbers_of_this_rank(merged)["loss"]
    finally:
        _precision.SUM_DTYPES.pop("cpu", None)


def test_pairs_are_summed_over_ranks_in_float64(two_ranks: RankPool) -> None:
    values = two_ranks.run(sync_pairs)
    assert [value for value, _ in values] == [(2**24 + 1) / 2] * 2
    assert [merged for _, merged in values] == [2.0, 2.0**25]


# The value's algebra, against Python's loops over fractions. Multiples of 1/8 up to 125 are summed exactly.

Numbers = list[list[Fraction]]


@dataclass(frozen=True)
class Update:
    """One update: a number for each sum and task, and how many rows it has."""

    sums: Numbers
    rows: int


@dataclass(frozen=True)
class Kept:
    """What is kept of some updates: how many sums, tasks and places, and which rank's."""

    sums: int
    tasks: int
    window: int | None
    window_rows: int | None
    ranks: int
    is_pair: bool

    @property
    def layout(self) -> SumsFormat:
        """The format."""
        return SumsFormat(self.sums, self.tasks, self.window, self.window_rows)

    @contextmanager
    def on_its_device(self) -> Iterator[None]:
        """The CPU as the device whose format it is."""
        with mock.patch.dict(_precision.SUM_DTYPES, {"cpu": torch.float32} if self.is_pair else {}):
            yield

    def state(self, updates: Sequence[Update]) -> Tensor:
        """The state after these updates."""
        state = self.layout.zeros(CPU)
        assert (state.dtype == torch.float32) == self.is_pair
        for update in updates:
            sums = [torch.tensor([float(x) for x in row], dtype=state.dtype) for row in update.sums]
            packed = self.layout.pack([*sums, *([update.rows] if self.window_rows else [])], drops_non_finite=True)
            self.layout.add(state, packed, self.ranks)
        return state

    def value(self, updates: Sequence[Update], carried: Sequence[Update] = ()) -> RunningSums:
        """The sums of updates, beside those of other updates that are carried."""
        own = self.layout.read(self.state(updates), self.ranks)
        if not carried:
            return own
        return own + RunningSums.carried(self.layout.read(self.state(carried), self.ranks).of_rank(0))

    def expected(self, updates: Sequence[Update]) -> list[Numbers]:
        """The sums and counters of all updates, then those of each place, old to new."""
        places: dict[int, list[Update]] = {}
        count = self.window or min(self.window_rows or 0, 1000)
        begun = seen = 0
        for update in updates:
            seen += update.rows if self.window_rows else 1
            share = Fraction(self.ranks * count, self.window_rows) if self.window_rows else 1
            begun = math.ceil(seen * share)
            places.setdefault(begun - 1, []).append(update)
        kept = [places.get(place, []) for place in range(begun - count, begun)]
        return [self.total(each) for each in (updates, *kept)]

    def total(self, updates: Sequence[Update]) -> Numbers:
        """The sums of updates, and the counters below them."""
        count, rows = Fraction(len(updates)), Fraction(sum(update.rows for update in updates))
        counters = [[number] * self.tasks for number in (count, *([rows] if self.window_rows else []), count)]
        sums = [
            [sum((u.sums[i][task] for u in updates), Fraction(0)) for task in range(self.tasks)]
            for i in range(self.sums)
        ]
        return [*sums, *counters]


kept = st.builds(
    lambda window, **others: Kept(window=window[0], window_rows=window[1], **others),
    sums=st.integers(1, 3),
    tasks=st.integers(1, 3),
    window=st.sampled_from([(None, None), (1, None), (3, None), (None, 1), (None, 5), (None, 2500)]),
    ranks=st.integers(1, 3),
    is_pair=st.booleans(),
)


def updates_of(kind: Kept, most: int = 6) -> st.SearchStrategy[list[Update]]:
    """Updates that it can keep; some have no rows, and some more than a window has."""
    number = st.integers(-1000, 1000).map(lambda eighths: Fraction(eighths, 8))
    sums = st.lists(st.lists(number, min_size=kind.tasks, max_size=kind.tasks), min_size=kind.sums, max_size=kind.sums)
    return st.lists(st.builds(Update, sums, st.sampled_from([0, 1, 2, 3, 7, 4000])), max_size=most)


def exact(sums: Tensor) -> list[Numbers]:
    """The numbers of ``(1 + places, rows, tasks)``."""
    return [[[Fraction(x) for x in row] for row in part] for part in sums.tolist()]


def plus(first: list[Numbers], second: list[Numbers]) -> list[Numbers]:
    """The sum, number by number."""
    return [[[x + y for x, y in zip(*rows)] for rows in zip(*parts)] for parts in zip(first, second)]


def equal(first: RunningSums, second: RunningSums) -> bool:
    """To the last bit."""
    return torch.equal(first.parts, second.parts)


@given(kept, st.data())
def test_the_sums_of_updates_are_read_old_to_new(kind: Kept, data: st.DataObject) -> None:
    updates = data.draw(updates_of(kind))
    with kind.on_its_device():
        state = kind.state(updates)
        value = kind.layout.read(state, kind.ranks)
        horizons = kind.layout.read_horizons(state)
        assert kind.layout.update_count(state) == len(updates)
    expected = kind.expected(updates)
    assert exact(value.of_rank(0)) == exact(value.of_rank(1)) == expected
    everything, *recent = expected
    window = [functools.reduce(plus, ([part] for part in recent))[0]] if recent else []
    assert exact(horizons.of_rank(0)) == [everything, *window]
    sums, counts = kind.layout.split(horizons.of_rank(0))
    assert exact(sums) == [part[: kind.sums] for part in (everything, *window)]
    finite, offered, *_ = counts.tolist()
    assert finite == offered == [len(updates)] * kind.tasks


@given(kept, st.data())
def test_what_was_read_stays_as_the_state_goes_on(kind: Kept, data: st.DataObject) -> None:
    with kind.on_its_device():
        state = kind.state(data.draw(updates_of(kind)))
        found = [kind.layout.read(state, kind.ranks), kind.layout.read_horizons(state)]
        before = [value.parts.clone() for value in found]
        state += 1.0
        assert all(torch.equal(value.parts, was) for value, was in zip(found, before))


@given(kept, st.data())
def test_what_is_written_is_read_and_goes_on_alike(kind: Kept, data: st.DataObject) -> None:
    updates, carried, later = (data.draw(updates_of(kind)) for _ in range(3))
    with kind.on_its_device():
        value = kind.value(updates, carried)
        state = kind.layout.write(value, CPU, kind.ranks)
        assert equal(kind.layout.read(state, kind.ranks), value)
        assert torch.equal(kind.layout.write(kind.value(updates), CPU, kind.ranks), kind.state(updates))
        assert kind.layout.update_count(state) == len(updates) + len(carried)
        for update in later:
            rows = [torch.tensor([float(x) for x in row], dtype=state.dtype) for row in update.sums]
            packed = kind.layout.pack([*rows, *([update.rows] if kind.window_rows else [])], drops_non_finite=True)
            kind.layout.add(state, packed, kind.ranks)
        assert exact(kind.layout.read(state, kind.ranks).of_rank(1)) == kind.expected([*updates, *later])


@given(kept, st.data())
def test_a_merge_is_associative_and_commutative_and_can_be_taken_back(kind: Kept, data: st.DataObject) -> None:
    with kind.on_its_device():
        a, b, c = (kind.value(data.draw(updates_of(kind, 3)), data.draw(updates_of(kind, 2))) for _ in range(3))
    assert equal(a + b, b + a)
    assert equal((a + b) + c, a + (b + c))
    assert equal((a + b) - b, a)
    assert equal(a + (b - b), a)


@given(kept, st.data())
def test_without_a_window_to_add_is_to_merge(kind: Kept, data: st.DataObject) -> None:
    kind = replace(kind, window=None, window_rows=None)
    first, second = (data.draw(updates_of(kind)) for _ in range(2))
    with kind.on_its_device():
        assert equal(kind.value([*first, *second]), kind.value(first) + kind.value(second))


@given(kept, st.data())
def test_a_snapshot_leaves_what_came_after_it_and_the_window(kind: Kept, data: st.DataObject) -> None:
    before, after = (data.draw(updates_of(kind)) for _ in range(2))
    with kind.on_its_device():
        snapshot = kind.value(before).without_window()
        found = kind.value([*before, *after]) - snapshot
    everything, *_ = kind.expected(after)
    _, *window = kind.expected([*before, *after])
    assert exact(found.of_rank(0)) == [everything, *window]


@given(kept, st.integers(1, 4), st.booleans(), st.data())
def test_the_ranks_parts_are_their_own_sums_and_what_is_carried_once(
    kind: Kept, ranks: int, first_alone: bool, data: st.DataObject
) -> None:
    kind = replace(kind, ranks=ranks)
    carried = data.draw(updates_of(kind, 3))
    of_ranks = [data.draw(updates_of(kind, 3)) for _ in range(ranks)]
    with kind.on_its_device():
        values = [
            kind.value(updates, carried if rank == 0 or not first_alone else ())
            for rank, updates in enumerate(of_ranks)
        ]
    expected = functools.reduce(plus, [kind.expected(updates) for updates in (carried, *of_ranks)])
    assert exact(torch.stack([value.of_rank(rank) for rank, value in enumerate(values)]).sum(0)) == expected
    sent = torch.stack([value.rows_of_rank(rank) for rank, value in enumerate(values)])
    assert exact(kind.layout.receive(sent.sum(0))) == expected


@given(kept, st.integers(2, 4), st.data())
def test_what_the_first_rank_does_not_carry_is_an_error(kind: Kept, ranks: int, data: st.DataObject) -> None:
    carried = data.draw(updates_of(kind).filter(bool))
    carriers = data.draw(st.sets(st.integers(1, ranks - 1), min_size=1))
    with kind.on_its_device():
        values = [kind.value([], carried if rank in carriers else ()) for rank in range(ranks)]
    sent = torch.stack([value.rows_of_rank(rank) for rank, value in enumerate(values)])
    with pytest.raises(RuntimeError, match="the first rank of the process group does not have"):
        kind.layout.receive(sent.sum(0))


def received(carried: Sequence[Sequence[float]]) -> list[float]:
    """What ranks get that carry these rows of one task each, two sums and two counters."""
    layout = SumsFormat(2, 1)
    values = [RunningSums.carried(torch.tensor(rows, dtype=torch.float64).view(layout.shape)) for rows in carried]
    # In the order of a ring: sums of sums of many at once would be rounded otherwise.
    sent = functools.reduce(torch.add, [value.rows_of_rank(rank) for rank, value in enumerate(values)])
    return layout.receive(sent).flatten().tolist()


@pytest.mark.parametrize("loss_sum", [math.nan, math.inf, -30.0, -7.0])
def test_carried_sums_of_any_sign_that_need_not_be_finite_are_told_from_none(loss_sum: float) -> None:
    """Also where all that is carried of a task adds up to 0."""
    carried, nothing = [loss_sum, 5.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]
    for ranks in ([carried, carried], [carried, nothing]):
        assert repr(received(ranks)) == repr(carried)
    with pytest.raises(RuntimeError, match="the first rank of the process group does not have"):
        received([nothing, carried])


@pytest.mark.parametrize("loss_sum", [0.1, 0.7, 1e-9, 1e9 / 7])
def test_many_ranks_that_carry_the_same_do_so_whatever_the_rounding_of_their_sum(loss_sum: float) -> None:
    carried = [loss_sum, 5.0, 1.0, 1.0]
    for ranks in range(1, 101):
        assert received([carried] * ranks) == carried
        with pytest.raises(RuntimeError, match="the first rank of the process group does not have"):
            received([carried] * ranks + [[loss_sum, 6.0, 1.0, 1.0]])


def test_a_state_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"totals: got shape \(2, 1, 4, 3\), expected \(2, 3, 4, 3\)"):
        SumsFormat(2, 3, window=2).read(SumsFormat(2, 3).zeros(CPU))


PACKAGE = Path(_precision.__file__).parent
READERS = ["_sums/ranks.py", *(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "_metrics").glob("*.py"))]
# What else has positions: a rank and the number of ranks, the bytes of a checkpoint, texts, shapes, and pictures.
OTHERS = {"place", "here", "place_in", "entry", "pair", "shown", "args", "key.partition", "like.shape", "axes.lines"}
OTHERS |= {"metric._plot", "'osD^'"}


@pytest.mark.parametrize("module", READERS)
def test_no_other_file_indexes_into_sums(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    subscripts = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    found = {ast.unparse(node.value) for node in subscripts if any(map(is_position, ast.walk(node.slice)))}
    assert {text.partition("(")[0] for text in found} <= OTHERS


def is_position(node: ast.AST) -> bool:
    return isinstance(node, ast.Slice) or (isinstance(node, ast.Constant) and isinstance(node.value, int))


@pytest.mark.parametrize("on_pairs", [False, True])
def test_cells_keep_their_digits_and_add_up_to_their_total(request: pytest.FixtureRequest, on_pairs: bool) -> None:
    """On a device without float64 as well, over many steps, and from several threads."""
    if on_pairs:
        request.getfixturevalue("pairs")
    metric = RankingQuality(["like", "reply"], segments={"country": ["DE", "US"]}, window=4)
    logits, labels, weights = torch.randn(64, 2), torch.randint(2, (64, 2)).float(), torch.rand(64, 2)
    ids = torch.arange(64) % 4 - 1

    def feed() -> None:
        for _ in range(100):
            metric.update(logits, labels, weights, segments={"country": ids})

    threads = [threading.Thread(target=feed) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = {key: value.item() for key, value in metric.compute().items()}
    cells = {"country=DE": [0], "country=US": [1], "country=other": [-1, 2]}
    tolerance = 1e-6 if on_pairs else 1e-12  # float32 sums of one batch
    for prefix, updates in (("", 300), ("window_", 4)):
        for column, task in enumerate(["like", "reply"]):
            for cell, members in cells.items():
                of_cell = [w for w, i in zip(weights[:, column].tolist(), ids.tolist()) if i in members]
                expected = updates * math.fsum(of_cell)
                assert found[f"{prefix}weight/{task}/{cell}"] == pytest.approx(expected, rel=tolerance)
            parts = [found[f"{prefix}weight/{task}/{cell}"] for cell in cells]
            assert math.fsum(parts) == pytest.approx(found[f"{prefix}weight/{task}"], rel=tolerance)
