"""Segments in the losses: a cell's losses are those of the rows that are in it, and nothing else is changed by them."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.support import quality_reference, reference
from tests.support.cases import REDUCTIONS, SEGMENTS, Settings, norm
from tests.support.compiler import FEWEST_ROWS
from tests.support.pairwise import pairwise
from tests.support.refusals import snapshot
from tests.support.results import assert_close, numbers
from tests.support.tiers import dozens
from twloss import Loss, MultiTaskLoss, RankingQuality, _precision
from twloss._rows import cell_sums

TASKS = ["like", "reply"]
COUNTRY: dict[str, Any] = {"country": ["DE", "US"]}
TWO: dict[str, Any] = {**COUNTRY, "surface": 3}
NAN = math.nan

eager_and_fused = pytest.mark.usefixtures("eager_and_fused")


def quiet(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without the warnings of reductions and sums that are chosen on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make(*args, **kwargs)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids_of(rows: int, segments: Mapping[str, Any] = TWO, seed: int = 0, tasks: int | None = None) -> dict[str, Tensor]:
    """Random ids, some of them of no name; with tasks by task too."""
    generator, shape = torch.Generator().manual_seed(seed), (rows,) if tasks is None else (rows, tasks)
    sizes = {name: ids if isinstance(ids, int) else len(ids) for name, ids in segments.items()}
    return {name: torch.randint(-1, size + 2, shape, generator=generator) for name, size in sizes.items()}


Oracle = Callable[[float, float, int], float]


def by_oracle(
    segments: Mapping[str, Any],
    logits: Any,
    labels: Tensor,
    ids: Mapping[str, Tensor],
    rule: reference.Rule | None = None,
    weights: Tensor | None = None,
    of_row: Callable[..., float] = reference.bce_with_logits,
    missing: Sequence[float | None] = (None, None),
    tasks: Sequence[str] = TASKS,
) -> dict[str, float]:
    """The losses of all rows ``(rows, tasks)`` and of those of each cell, row by row."""
    rows, count = labels.shape
    weights = torch.ones(rows, count) if weights is None else weights.view(rows, -1).expand(rows, count)
    ids = {name: each.unsqueeze(1) if each.ndim == 1 else each for name, each in ids.items()}
    columns: dict[str, list[reference.Row]] = {}
    for t, task in enumerate(tasks):
        columns[task] = []
        for n in range(rows):
            y, w = labels[n, t].item(), weights[n, t].item()
            cells = [reference.cell_of(m, segments[m], int(ids[m].expand(rows, count)[n, t])) for m in segments]
            valid = not reference.is_missing(y, missing[t])
            loss = of_row(logits[n][t].tolist(), y) if valid and w != 0 else NAN
            columns[task].append(reference.Row(loss, weight=w, valid=valid, cells=cells))
    from_rule = rule or reference.Rule()
    exact = reference.Rule(**{**vars(from_rule), "cells": reference.cells_of(segments)})
    return reference.losses(columns, exact)


def approx(expected: Mapping[str, float], rel: float = 1e-12) -> Any:
    return pytest.approx(expected, rel=rel, nan_ok=True)


def computed(loss: Any) -> dict[str, float]:
    return numbers(quiet(loss.train_metric.compute))


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square()


def one_of_classes(logits: list[float], label: float) -> float:
    return reference.cross_entropy(logits, int(label))


def one_square(logit: float, label: float) -> float:
    return (logit - label) ** 2


# What a cell's losses are.


@pairwise(
    "eager_and_fused",
    reduction=REDUCTIONS,
    segments=[each for each in SEGMENTS if each],
    over_rows=["mean", "sum"],
    by_task={"by row": False, "by row and task": True},
    eager_and_fused={"eager": False, "fused": True},
)
@pytest.mark.usefixtures("eager_and_fused")
def test_a_cells_losses_are_those_of_its_rows(reduction: Any, segments: Any, over_rows: Any, by_task: bool) -> None:
    case = Settings(2, over_rows, reduction, [0.5, 2.0], [1.0, 3.0], "weights", NAN, segments=segments)
    logits, labels, weights = 6 * rand(23, 2) - 3, rand(23, 2, seed=1), rand(23, 2, seed=2)
    labels[rand(23, 2, seed=3) < 0.3] = NAN
    weights[rand(23, 2, seed=4) < 0.3] = 0.0
    labels[0], logits[1], weights[:2] = 7.0, NAN, 0.0  # which weights of 0 hide
    ids = ids_of(23, segments, tasks=2 if by_task else None)
    loss = case.loss()
    for part in (slice(9), slice(9, 9), slice(9, 23)):
        own = {name: each[part] for name, each in ids.items()}
        loss(logits[part].requires_grad_(), labels[part], weights[part], segments=own)
    factors = dict(zip(TASKS, [0.5, 2.0]))
    columns: dict[str, list[reference.Row]] = {task: [] for task in case.names()}
    for t, (task, factor) in enumerate(zip(columns, factors.values())):
        for n in range(23):
            x, y, w = logits[n, t].item(), labels[n, t].item(), weights[n, t].item()
            row_ids = {name: each if each.ndim == 1 else each[:, t] for name, each in ids.items()}
            cells = [reference.cell_of(name, segments[name], int(each[n])) for name, each in row_ids.items()]
            valid = not math.isnan(y)
            own_loss = reference.bce_with_logits(x, y, factor) if valid and w else NAN
            columns[task].append(reference.Row(own_loss, weight=w, valid=valid, cells=cells))
    expected = reference.losses(columns, case.rule())
    assert computed(loss) == approx(expected)
    assert list(computed(loss)) == list(expected)


TYPES: dict[str, tuple[Any, Callable[..., float], tuple[int, ...]]] = {
    "binary": ("bce_with_logits", reference.bce_with_logits, ()),
    "classes": ("cross_entropy", one_of_classes, (4,)),
    "own": (squared, one_square, ()),
    "a module": (nn.MSELoss(reduction="none"), one_square, ()),
}


@eager_and_fused
@pytest.mark.parametrize(("loss_type", "of_row", "classes"), TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_any_type_of_loss(loss_type: Any, of_row: Any, classes: tuple[int, ...], weighted: bool) -> None:
    loss = MultiTaskLoss(loss_type, TASKS, segments=TWO)
    logits, labels = 6 * rand(17, 2, *classes) - 3, (rand(17, 2, seed=1) * (4 if classes else 2)).floor()
    weights = rand(17, seed=2) if weighted else None
    loss(logits, labels.long(), weights, segments=ids_of(17))
    expected = by_oracle(TWO, logits, labels, ids_of(17), weights=weights, of_row=of_row)
    assert computed(loss) == approx(expected)


def test_a_callable_whose_rows_depend_on_each_other() -> None:
    """The loss of a row is what the callable makes of all rows; the cell only says which rows are added."""

    def centred(logits: Tensor, labels: Tensor, *, valid: Tensor) -> Tensor:
        mean = (logits * valid).sum(0) / valid.sum(0)
        return (logits - mean - labels).square() * valid

    loss = MultiTaskLoss(centred, TASKS, ignore_index=-1, segments=TWO)
    logits, labels = rand(11, 2), rand(11, 2, seed=1)
    labels[rand(11, 2, seed=2) < 0.3] = -1.0
    loss(logits.requires_grad_(), labels, segments=ids_of(11))["loss"].backward()
    there = labels != -1
    means = [(logits[there[:, t], t].sum() / there[:, t].sum()).item() for t in range(2)]
    shifted = logits.detach() - torch.tensor(means, dtype=torch.float64)
    expected = by_oracle(TWO, shifted, labels, ids_of(11), of_row=one_square, missing=(-1.0, -1.0))
    assert computed(loss) == approx(expected)


MIXED: dict[str, Any] = {"like": "bce_with_logits", "price": squared, "topic": "cross_entropy", "reply": "given"}


@eager_and_fused
@pytest.mark.parametrize("has_shared_ids", [False, True])
def test_tasks_of_different_types_with_rows_of_their_own(has_shared_ids: bool) -> None:
    sizes = {"like": 40, "price": 40 if has_shared_ids else 5, "topic": 40 if has_shared_ids else 0}
    loss = MultiTaskLoss(MIXED, list(MIXED), segments=TWO, quality=True, validate_args=True)
    logits = {task: rand(n, *((3,) if task == "topic" else ())).requires_grad_() for task, n in sizes.items()}
    labels = {task: (2 * rand(n, seed=1)).floor() for task, n in sizes.items()}
    labels["topic"] = labels["topic"].long()
    by_name: dict[str, dict[str, Tensor]] = {
        task: ids_of(n, seed=0 if has_shared_ids else n) for task, n in sizes.items()
    }
    ids: Any = {name: {task: by_name[task][name] for task in reversed(sizes)} for name in TWO}
    ids = ids_of(40) if has_shared_ids else ids
    loss(logits, labels, given={"reply": torch.tensor(2.0)}, segments=ids)["loss"].backward()
    columns: dict[str, list[reference.Row]] = {"reply": [reference.Row(2.0)]}
    oracles: dict[str, Any] = {"like": reference.bce_with_logits, "price": one_square, "topic": one_of_classes}
    impressions: dict[str, list[Any]] = {cell: [] for cell in ("", *reference.cells_of(TWO))}
    for task, own in by_name.items():
        columns[task] = []
        for n, (x, y) in enumerate(zip(logits[task].tolist(), labels[task].tolist())):
            cells = [reference.cell_of(name, TWO[name], int(own[name][n])) for name in TWO]
            columns[task].append(reference.Row(oracles[task](x, y), cells=cells))
            for cell in ("", *cells) if task == "like" else ():
                impressions[cell].append((x, y, 1.0))
    rule = reference.Rule(cells=reference.cells_of(TWO))
    assert computed(loss) == approx(reference.losses({task: columns[task] for task in MIXED}, rule))
    quality = numbers(loss.train_quality.compute())
    for cell, rows in impressions.items():
        found = {key: quality[f"{key}/like/{cell}".rstrip("/")] for key in quality_reference.QUANTITIES}
        assert_close(found, quality_reference.quality(rows))


def test_a_given_task_is_in_no_cell_and_left_out_of_their_global_losses() -> None:
    loss = MultiTaskLoss({"a": "bce_with_logits", "b": "given"}, ["a", "b"], segments={"x": 1})
    for weight in (1.0, torch.tensor(3)):
        loss(
            torch.zeros(2, 1),
            torch.ones(2, 1),
            given={"b": (torch.tensor(5.0), weight)},
            segments={"x": torch.zeros(2).int()},
        )
    found = computed(loss)
    assert found["loss/x=0"] == found["loss/a/x=0"] == pytest.approx(math.log(2), rel=1e-6)
    assert math.isnan(found["loss/b/x=0"])
    assert math.isnan(found["loss/x=other"])
    assert found["loss/b"] == 2.5


# The one-task form.


SHAPES = [(5,), (5, 3), (2, 2), (3, 2, 4), ()]


@eager_and_fused
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("segments", [COUNTRY, TWO], ids=["one dimension", "two"])
def test_labels_of_any_shape_and_ids_that_broadcast_to_them(segments: Any, shape: tuple[int, ...]) -> None:
    of_ids = {shape[start:] for start in range(len(shape) + 1)} | {shape}
    of_ids |= {tuple(1 if axis != kept else size for axis, size in enumerate(shape)) for kept in range(len(shape))}
    for place, own in enumerate(sorted(of_ids)):
        logits, labels = 6 * rand(*shape, seed=place) - 3, rand(*shape, seed=place + 1)
        ids = {name: torch.randint(-1, 4, own) for name in segments}
        loss = Loss("bce_with_logits", segments=segments)
        loss(logits.requires_grad_(), labels, segments=ids).backward()
        whole = {name: each.expand(shape).reshape(-1, 1) for name, each in ids.items()}
        inputs = logits.detach().reshape(-1, 1), labels.reshape(-1, 1), whole
        expected = by_oracle(segments, *inputs, tasks=["x"], missing=(None,))
        assert computed(loss) == approx({key: value for key, value in expected.items() if "/x" not in key})


def test_ids_of_two_dimensions_may_have_different_shapes() -> None:
    logits, labels = rand(3, 4), rand(3, 4, seed=1)
    ids = {"country": torch.tensor([[0], [1], [2]]), "surface": torch.tensor([2, 1, 0, 9])}
    loss = Loss("bce_with_logits", segments=TWO)
    loss(logits, labels, segments=ids)
    whole = {name: each.expand(3, 4).reshape(-1, 1) for name, each in ids.items()}
    expected = by_oracle(TWO, logits.view(-1, 1), labels.view(-1, 1), whole, tasks=["x"], missing=(None,))
    assert computed(loss) == approx({key: value for key, value in expected.items() if "/x" not in key})


def mean_of_last(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss whose rows are all but the labels' last dimension."""
    return (logits - labels).square().mean(-1)


@pytest.mark.parametrize("shape", [(6,), (2,), (2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_callable_whose_result_tells_the_rows(shape: tuple[int, ...], weighted: bool) -> None:
    logits, labels = rand(*shape, 3), rand(*shape, 3, seed=1)
    weights = rand(*shape, seed=2) if weighted else None
    ids = {"country": torch.randint(-1, 3, shape), "surface": torch.randint(-1, 4, shape[-1:])}
    loss = Loss(mean_of_last, segments=TWO)
    loss(logits.requires_grad_(), labels, weights, segments=ids).backward()
    rows = list(zip(logits.reshape(-1, 3).tolist(), labels.reshape(-1, 3).tolist()))
    losses = torch.tensor([[sum((a - b) ** 2 for a, b in zip(x, y)) / 3] for x, y in rows], dtype=torch.float64)
    whole = {name: each.expand(shape).reshape(-1, 1) for name, each in ids.items()}
    factors = None if weights is None else weights.reshape(-1, 1)
    options: Any = {"weights": factors, "of_row": lambda x, _: x, "tasks": ["x"], "missing": (None,)}
    expected = by_oracle(TWO, losses, torch.zeros_like(losses), whole, **options)
    assert computed(loss) == approx({key: value for key, value in expected.items() if "/x" not in key})


# Ids.


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "(rows,)": lambda ids: ids,
    "(rows, 1)": lambda ids: ids.unsqueeze(1),
    "(rows, tasks)": lambda ids: ids.unsqueeze(1).repeat(1, 2),
    "expanded": lambda ids: ids.unsqueeze(1).expand(-1, 2),
    "transposed": lambda ids: ids.repeat(2, 1).T,
    "strided": lambda ids: ids.repeat_interleave(3)[::3],
    "a mapping": lambda ids: dict.fromkeys(reversed(TASKS), ids),
    "a mapping of (rows, 1)": lambda ids: dict.fromkeys(TASKS, ids.unsqueeze(1)),
    "a mapping of two dtypes": lambda ids: {"like": ids.int(), "reply": ids.to(torch.int8)},
}


@pairwise(
    "eager_and_fused",
    form=list(FORMS),
    rows=[2, 33],
    is_mixed={"one type": False, "two types": True},
    eager_and_fused={"eager": False, "fused": True},
)
@pytest.mark.usefixtures("eager_and_fused")
def test_every_form_of_ids_tells_the_same_rows_apart(form: str, rows: int, is_mixed: bool) -> None:
    """As many rows as tasks make no difference: ids (rows,) are by row."""
    types: Any = {"like": "bce_with_logits", "reply": squared} if is_mixed else "bce_with_logits"
    ids, logits, labels = ids_of(rows), rand(rows, 2), rand(rows, 2, seed=1)
    plain, other = MultiTaskLoss(types, TASKS, segments=TWO), MultiTaskLoss(types, TASKS, segments=TWO)
    plain(logits, labels, segments=ids)
    given_ids = {"country": FORMS[form](ids["country"]), "surface": ids["surface"]}
    before = snapshot(given_ids), copy.deepcopy(given_ids)
    other(logits, labels, segments=given_ids)
    # Rows may be added in another order.
    torch.testing.assert_close(other.train_metric.totals, plain.train_metric.totals, rtol=1e-14, atol=0.0)
    assert snapshot(given_ids) == before[0]
    assert str(given_ids) == str(before[1])
    if not is_mixed:
        assert computed(plain) == approx(by_oracle(TWO, logits, labels, ids))


INTEGERS = {
    **{dtype: torch.iinfo(dtype) for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)},
    **{dtype: torch.iinfo(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64)},
}


@eager_and_fused
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_dtype_and_of_any_size(dtype: torch.dtype) -> None:
    """The least and the largest number are ids of no name, and so of "other"."""
    loss = quiet(MultiTaskLoss, "bce_with_logits", ["a"], "sum", segments={"x": 2})
    info = INTEGERS[dtype]
    ids = torch.tensor([0, 1, 1, 2, info.min or 5, info.max], dtype=dtype)
    loss(torch.zeros(6, 1), torch.ones(6, 1), segments={"x": ids})
    loss_sum = loss.train_metric.totals[0, 0, 0] / math.log(2)
    assert loss_sum.tolist() == pytest.approx([6, 1, 2, 3], rel=1e-6)


def test_names_of_dimensions_and_tasks_may_be_the_same() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["country", "loss"], segments={"country": ["loss"], "loss": 1})
    loss(rand(4, 2), rand(4, 2), segments={name: torch.zeros(4, dtype=torch.int64) for name in ("country", "loss")})
    assert len(loss.train_metric.compute()) == len(loss.train_metric.keys()) == 3 * 5


# Many rows.


@pytest.mark.parametrize("rows", [8192, 8193, 20_001])
@pytest.mark.parametrize("weighted", [False, True])
def test_more_rows_than_are_taken_at_once(rows: int, weighted: bool) -> None:
    segments = {**TWO, "hour": 24}
    logits, labels = 6 * rand(rows, 2) - 3, rand(rows, 2, seed=1)
    weights = rand(rows, 2, seed=2) if weighted else None
    ids = {**ids_of(rows, segments), "surface": ids_of(rows, segments, tasks=2)["surface"]}
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=segments)
    loss(logits, labels, weights, segments=ids)
    exact = by_oracle(segments, logits, labels, ids, weights=weights)
    assert computed(loss) == approx(exact)


def test_a_number_of_ids_may_be_one_of_numpys() -> None:
    assert Loss("bce_with_logits", segments={"x": np.int64(2)}).segments == {"x": 2}  # type: ignore[dict-item]


def test_many_rows_of_a_cell_keep_their_digits_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)
    weights = rand(300_000, 2).float()
    loss = MultiTaskLoss("bce_with_logits", TASKS, mean_over="weights", segments={"x": 1})
    logits, labels = torch.zeros(300_000, 2), torch.ones(300_000, 2)
    for ids in (torch.zeros(300_000, dtype=torch.int64), torch.zeros(300_000, 2, dtype=torch.int64)):
        loss.reset()
        loss(logits, labels, weights, segments={"x": ids})
        _, of_weight, *_ = loss.train_metric._read().of_rank(0)[0]
        assert of_weight.tolist()[2:4] == pytest.approx(weights.double().sum(0).tolist(), rel=1e-6)


@pytest.mark.parametrize("rows_a_place", [1, 16, 10**9], ids=["joined", "as it is", "apart"])
def test_dimensions_told_apart_together_or_one_by_one(rows_a_place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_sums, "_ROWS_A_PLACE", rows_a_place)
    monkeypatch.setattr(cell_sums, "_CHUNK", 64)
    segments: dict[str, Any] = {"a": 1, "b": 3, "c": 2, "d": 40}
    logits, labels, ids = rand(1000, 2), rand(1000, 2, seed=1), ids_of(1000, segments)
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=segments)
    loss(logits, labels, segments=ids)
    assert computed(loss) == approx(by_oracle(segments, logits, labels, ids))


# Cells add up to the total.


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Segments, and a batch as tensors or as mappings with rows of each task's own; with labels that are missing."""
    names = ["a", "b", "c"]
    segments = {name: draw(st.integers(1, 3)) for name in names[: draw(st.integers(1, 3))]}
    tasks = draw(st.integers(1, 3))
    is_ragged = draw(st.booleans())
    sizes = [draw(st.integers(0, 40)) for _ in range(tasks)]
    sizes = sizes if is_ragged else sizes[:1] * tasks
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list[Tensor]] = {"logits": [], "labels": [], "weights": [], **{name: [] for name in segments}}
    for rows in sizes:
        logits, labels, weights, spoilt = torch.rand(4, rows, generator=generator, dtype=torch.float64)
        weights = weights * (spoilt > 0.3)
        logits, labels = logits.where(spoilt > 0.2, NAN), labels.where(spoilt > 0.1, NAN)
        columns["labels"].append(labels.where(torch.rand(rows, generator=generator) > 0.2, -1.0))
        columns["logits"].append(logits)
        columns["weights"].append(weights)
        for name, size in segments.items():
            columns[name].append(torch.randint(-2, size + 3, (rows,), generator=generator))
    keys = [f"t{t}" for t in range(tasks)]
    inputs = {name: dict(zip(keys, each)) if is_ragged else torch.stack(each, 1) for name, each in columns.items()}
    return {"segments": segments, "tasks": keys, **inputs}


@given(batch=batches(), mean_over=st.sampled_from(["rows", "weights"]), over_rows=st.sampled_from(["mean", "sum"]))
@dozens(2)
def test_the_cells_of_a_dimension_add_up_to_the_total(batch: dict[str, Any], mean_over: Any, over_rows: Any) -> None:
    segments, tasks = batch["segments"], batch["tasks"]
    options: dict[str, Any] = {"mean_over": mean_over, "ignore_index": -1, "quality": True, "segments": segments}
    loss = quiet(MultiTaskLoss, "bce_with_logits", tasks, over_rows, **options)
    inputs = batch["logits"], batch["labels"], batch["weights"]
    loss(*inputs, segments={name: batch[name] for name in segments})
    plain = quiet(MultiTaskLoss, "bce_with_logits", tasks, over_rows, **{**options, "segments": None})
    plain(*inputs)
    for metric in ("train_metric", "train_quality"):
        found = getattr(loss, metric).totals[0, 0].unflatten(-1, (-1, len(tasks)))
        total = getattr(plain, metric).totals[0, 0]
        assert torch.equal(found[:, 0], total)
        start = 1
        sums = found[:-2]  # below them are the counters of updates
        for size in segments.values():
            of_dimension = sums[:, start : start + size + 1].sum(1)
            assert torch.allclose(of_dimension, total[:-2], rtol=1e-13, atol=1e-300)
            start += size + 1
        assert total.isfinite().all()


# Nothing else is changed.


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"mean_over": "weights", "quality": True},
    "sum of callables": {"task_loss_reduction": "sum", "global_reduction": norm},
    "median and missing": {"global_reduction": "median", "ignore_index": 0.0, "validate_args": True},
    "factors": {"pos_weights": [0.5, 2.0], "task_weights": [1.0, 0.0], "quality": True},
    "two types": {"loss_type": {"like": "bce_with_logits", "reply": squared}},
}


@pairwise(
    "eager_and_fused",
    options=CHANGES,
    rows=[7, 2 * FEWEST_ROWS, 512],
    normalizer=[None, 3.0],
    eager_and_fused={"eager": False, "fused": True},
)
@pytest.mark.usefixtures("eager_and_fused")
def test_losses_gradients_and_totals_are_the_same_to_the_bit(
    options: dict[str, Any], rows: int, normalizer: float | None
) -> None:
    if normalizer and not {"task_loss_reduction", "global_reduction"}.isdisjoint(options):
        normalizer = None  # there is none for what does not add up
    kwargs = {"loss_type": "bce_with_logits", "tasks": TASKS, **options}
    ours, theirs = quiet(MultiTaskLoss, **kwargs, segments=TWO), quiet(MultiTaskLoss, **kwargs)
    results = []
    for loss, asked in ((ours, {"segments": ids_of(rows)}), (theirs, {})):
        logits = (6 * rand(rows, 2) - 3).float().requires_grad_()
        labels, weights = rand(rows, 2, seed=1).round().float(), rand(rows, 2, seed=2).float()
        losses = loss(logits, labels, weights, normalizer=normalizer, **asked)
        losses["loss"].backward(retain_graph=True)
        first, logits.grad = logits.grad, None
        losses["loss"].backward()
        totals = [metric.totals[..., :2] for metric in loss.children() if hasattr(metric, "totals")]
        results.append((*losses.values(), first, logits.grad, *totals))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("of", ["labels", "weights"])
@pytest.mark.parametrize("options", [{}, {"mean_over": "weights"}, {"quality": True}, {"task_loss_reduction": "sum"}])
def test_gradients_by_labels_and_weights(of: str, options: dict[str, Any]) -> None:
    results = []
    for segments in (None, TWO):
        loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, segments=segments, **options)
        inputs: dict[str, Any] = {"labels": rand(9, 2, seed=1), "weights": rand(9, 2, seed=2)}
        inputs[of].requires_grad_()
        loss(rand(9, 2).requires_grad_(), **inputs, segments=segments and ids_of(9))["loss"].backward()
        assert not loss.train_metric.totals.requires_grad
        results.append((inputs[of].grad, loss.train_metric.totals[..., :2]))
        if segments:
            rule = reference.Rule(
                options.get("task_loss_reduction", "mean"), mean_over=options.get("mean_over", "rows")
            )
            details = [inputs[name].detach() for name in ("labels", "weights")]
            expected = by_oracle(TWO, rand(9, 2), details[0], ids_of(9), rule, details[1])
            assert computed(loss) == approx(expected)
    assert all(torch.equal(mine, other) for mine, other in zip(*results))


def test_second_derivatives() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO)
    logits = rand(5, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: loss(x, rand(5, 2, seed=1), segments=ids_of(5))["loss"], (logits,))


# Reductions that are modules, or want to know which tasks have data.


class Learned(nn.Module):
    """The log-sum-exp of the tasks that have data, times a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Of those alone."""
        return self.factor * losses.masked_fill(~present, -math.inf).logsumexp(0)


def test_a_module_reduces_each_cell_over_the_tasks_that_have_data_in_it() -> None:
    loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, "mean", Learned(), segments={"x": 2})
    logits, labels = rand(6, 2), rand(6, 2, seed=1)
    ids = torch.tensor([[0, 1], [0, 1], [1, 1], [0, 1], [0, 1], [1, 1]])
    loss(logits, labels, segments={"x": ids})["loss"].backward()
    found = computed(loss)
    for cell in ("x=0", "x=1"):
        own = [found[f"loss/{task}/{cell}"] for task in TASKS]
        expected = 2 * math.log(math.fsum(math.exp(value) for value in own if not math.isnan(value)))
        assert found[f"loss/{cell}"] == pytest.approx(expected, rel=1e-12)
    assert math.isnan(found["loss/reply/x=0"])
    assert math.isnan(found["loss/x=other"])
    assert loss.train_metric.compute_async().wait().keys() == found.keys()


# What is not finite, or wrong.


@eager_and_fused
@pytest.mark.parametrize("nan_strategy", ["warn", "ignore", "error", "disable"])
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_task_whose_sums_are_not_finite_is_left_out_of_all_cells(nan_strategy: Any, value: float) -> None:
    loss = MultiTaskLoss(squared, TASKS, segments={"x": 2})
    loss.train_metric.nan_strategy = nan_strategy
    logits, labels, ids = rand(8, 2), rand(8, 2, seed=1), ids_of(8, {"x": 2})
    loss(logits, labels, segments=ids)
    spoilt = logits.clone()
    spoilt[3, 0] = value
    loss(spoilt, labels, segments=ids)
    once = by_oracle({"x": 2}, logits, labels, ids, of_row=one_square)
    if nan_strategy == "error":
        with pytest.raises(RuntimeError, match=r"not finite: like: 1$"):
            loss.train_metric.compute()
        return
    if nan_strategy == "warn":
        with pytest.warns(UserWarning, match=r"not finite: like: 1$"):
            found = numbers(loss.train_metric.compute())
    else:
        found = computed(loss)
    if nan_strategy == "disable":
        cell = reference.cell_of("x", 2, int(ids["x"][3]))
        wrong = {"loss", "loss/like", f"loss/{cell}", f"loss/like/{cell}"}
        assert {key for key, number in found.items() if not math.isfinite(number) and math.isfinite(once[key])} == wrong
        once = {key: number for key, number in once.items() if key not in wrong}
        found = {key: found[key] for key in once}
    assert found == approx(once)


def test_a_sum_near_the_largest_number_is_finite_though_that_of_its_cells_is_not() -> None:
    loss = quiet(MultiTaskLoss, "bce_with_logits", TASKS, "sum", segments={"x": 1, "y": 1})
    ids = torch.zeros(1, dtype=torch.int64)
    loss(torch.full((1, 2), 1.5e308, dtype=torch.float64), torch.zeros(1, 2), segments={"x": ids, "y": ids})
    assert computed(loss)["loss/like"] == computed(loss)["loss/like/y=0"] == 1.5e308


@eager_and_fused
def test_invalid_labels_are_counted_by_task_and_not_by_cell() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO, validate_args=True, quality=True)
    labels, weights = torch.ones(6, 2), torch.ones(6, 2)
    labels[0, 0] = labels[1, 0] = 2.0
    weights[3, 1] = -1.0
    loss(rand(6, 2), labels, weights, segments=ids_of(6))
    expected = r"got invalid labels \(outside of \[0, 1\], or no class\): like: 2; negative weights: reply: 1$"
    with pytest.warns(UserWarning, match=expected):
        loss.train_metric.compute()


# The quality.


@eager_and_fused
@pytest.mark.parametrize("window", [{}, {"window": 1}, {"window_rows": 30}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_quality_of_a_cell_is_that_of_its_rows(window: dict[str, Any], weighted: bool) -> None:
    quality = RankingQuality(TASKS, logit_shift=[0.5, -1.0], **window)
    loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[3.0, 1.0], quality=quality, segments=TWO)
    logits, labels = 6 * rand(40, 2) - 3, rand(40, 2, seed=1).round()
    weights, ids = rand(40, 2, seed=2) if weighted else None, ids_of(40, tasks=2)
    loss(rand(40, 2, seed=5), labels, segments=ids)
    loss.train_quality.reset()
    loss(logits.requires_grad_(), labels, weights, segments=ids)["loss"].backward()
    found = numbers(loss.train_quality.compute())
    for t, task in enumerate(TASKS):
        for cell in ("", *reference.cells_of(TWO)):
            rows = []
            for n in range(40):
                own = [reference.cell_of(name, TWO[name], int(ids[name][n, t])) for name in TWO]
                if cell in ("", *own):
                    weight = 1.0 if weights is None else weights[n, t].item()
                    rows.append((logits[n, t].item() + [0.5, -1.0][t], labels[n, t].item(), weight))
            expected = quality_reference.quality(rows)
            for horizon in ("", "window_") if window else ("",):
                keys = {key: f"{horizon}{key}/{task}/{cell}".rstrip("/") for key in expected}
                assert_close({key: found[name] for key, name in keys.items()}, expected)


# Compilers and transforms.


class Model(nn.Module):
    """A model with its loss, of a form of ids."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO, **options)

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor, ids: dict[str, Tensor]) -> Tensor:
        """The global loss."""
        return self.loss(self.heads(features), labels, weights, segments=ids)["loss"]


def inputs_of(rows: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(rows, 3), torch.rand(rows, 2), torch.rand(rows, 2), ids_of(rows, seed=rows)


COMPILED: dict[str, dict[str, Any]] = {
    "plain": {},
    "quality": {"quality": True, "mean_over": "weights"},
    "a callable": {"global_reduction": Tensor.sum},
    "missing": {"ignore_index": -1, "pos_weights": [1.0, 2.0]},
    "fused": {"fused": True},
}


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("rows", [48, 45], ids=["rows by 16", "rows"])
def test_one_graph_for_any_number_of_rows(options: dict[str, Any], rows: int) -> None:
    model = quiet(Model, **options)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for step in range(6):
        inputs = inputs_of(rows + 32 * step)
        compiled(*inputs).backward()
        twin(*inputs).backward()
    assert counter.frame_count == 1
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
    for name in ("train_metric", "train_quality") if options.get("quality") else ("train_metric",):
        assert numbers(getattr(model.loss, name).compute()) == approx(numbers(getattr(twin.loss, name).compute()), 1e-5)


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("of", ["weights", "labels"])
def test_a_compiled_gradient_by_another_input(of: str) -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO, mean_over="weights", quality=True)
    twin = copy.deepcopy(loss)
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs: dict[str, Any] = {"labels": rand(9, 2, seed=1), "weights": rand(9, 2, seed=2)}
    inputs[of].requires_grad_()
    gradients = [
        torch.autograd.grad(each(rand(9, 2).requires_grad_(), **inputs, segments=ids_of(9))["loss"], inputs[of])[0]
        for each in (compiled, twin)
    ]
    torch.testing.assert_close(*gradients)
    assert computed(loss) == approx(computed(twin))


@pytest.mark.usefixtures("inductor", "new_compiler")
def test_generated_code_gives_the_sums_of_cells() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO, quality=True, fused=True)
    logits, labels, weights = 6 * rand(67, 2) - 3, rand(67, 2, seed=1), rand(67, 2, seed=2)
    loss(logits.requires_grad_(), labels, weights, segments=ids_of(67))["loss"].backward()
    assert computed(loss) == approx(by_oracle(TWO, logits.detach(), labels, ids_of(67), weights=weights))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_counts_once(reentrant: bool) -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO)
    logits, labels = rand(9, 2).requires_grad_(), rand(9, 2, seed=1)
    checkpoint(lambda x: loss(x * 1, labels, segments=ids_of(9))["loss"], logits, use_reentrant=reentrant).backward()
    assert computed(loss) == approx(by_oracle(TWO, logits.detach(), labels, ids_of(9)))


def test_transforms_count_nothing_and_see_the_same_loss() -> None:
    loss, plain = (MultiTaskLoss("bce_with_logits", TASKS, segments=each) for each in (TWO, None))
    logits, labels = rand(4, 9, 2), rand(9, 2, seed=1)
    ids = ids_of(9)
    stacked = {name: torch.stack([each] * 4) for name, each in ids.items()}

    def one(x: Tensor, own: dict[str, Tensor]) -> Tensor:
        return loss(x, labels, segments=own)["loss"]

    found = torch.vmap(one)(logits, stacked)
    assert torch.equal(found, torch.vmap(lambda x: plain(x, labels)["loss"])(logits))
    gradient = torch.func.grad(lambda x: one(x, ids))(logits[0])
    assert torch.equal(gradient, torch.func.grad(lambda x: plain(x, labels)["loss"])(logits[0]))
    assert loss.train_metric.update_count == 0


def test_inference_mode_autocast_and_ids_made_in_inference_mode() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO, quality=True)
    logits, labels = rand(9, 2), rand(9, 2, seed=1)
    with torch.inference_mode():
        ids = ids_of(9)
        loss(logits, labels, segments=ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss(logits.requires_grad_(), labels, segments=ids)["loss"].backward()
    expected = by_oracle(TWO, logits.detach(), labels, ids_of(9))
    assert computed(loss) == approx(expected)


def test_tensors_without_values() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO, quality=True).to("meta")
    inputs = [torch.ones(9, 2, device="meta") for _ in range(2)]
    losses = loss(*inputs, segments={name: each.to("meta") for name, each in ids_of(9).items()})
    assert losses["loss"].is_meta
    loss.to_empty(device="cpu")
    loss.reset()
    loss(rand(9, 2), rand(9, 2, seed=1), segments=ids_of(9))
    assert computed(loss) == approx(by_oracle(TWO, rand(9, 2), rand(9, 2, seed=1), ids_of(9)))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "half": lambda loss: loss.half(),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_and_casts_go_on_with_the_same_cells(make_copy: Callable[[Any], Any]) -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS, segments=TWO, quality=True)
    logits, labels, ids = rand(20, 2), rand(20, 2, seed=1), ids_of(20)
    loss(logits[:9], labels[:9], segments={name: each[:9] for name, each in ids.items()})
    twin = make_copy(loss)
    twin(logits[9:], labels[9:], segments={name: each[9:] for name, each in ids.items()})
    assert computed(twin) == approx(by_oracle(TWO, logits, labels, ids))
    assert twin.segments == loss.segments == {"country": ("DE", "US"), "surface": 3}


# What a caller's own containers are.


def test_segments_are_what_they_were_at_construction() -> None:
    names, segments = ["DE", "US"], dict(COUNTRY)
    segments["country"] = names
    loss: Any = MultiTaskLoss("bce_with_logits", TASKS, segments=segments, quality=True)
    names.append("FR")
    segments["surface"] = 3
    loss.train_metric.segments.clear()
    loss(rand(4, 2), rand(4, 2, seed=1), segments=ids_of(4, COUNTRY))
    for each in (loss, loss.train_metric, loss.eval_metric, loss.train_quality, loss.eval_quality):
        assert each.segments == {"country": ("DE", "US")}
