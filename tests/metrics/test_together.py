"""``compute_all()``: which metrics a call is of, under which keys, and what becomes of their sums, come what may."""

from __future__ import annotations

import copy
import math
import pickle
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, MetricTracker
from torchmetrics.utilities.exceptions import TorchMetricsUserError
from torchmetrics.wrappers import MinMaxMetric

from tests.support import quality_reference, reference
from tests.support.metrics import KINDS, Batch, Kind, expect_result_of, of_every_kind, persistent
from tests.support.quality_batches import TASKS, Rows, attached, columns, random_rows
from tests.support.results import assert_close, fed, numbers
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality, TaskMetric, compute_all, compute_all_async

Numbers = dict[str, float]


def expected(batches: Sequence[Rows], prefix: str = "", *, quality: bool = True) -> Numbers:
    """The oracle's of all that a loss of these rows tracks."""
    rows = columns(batches)
    losses = {t: [reference.Row(reference.bce_with_logits(x, y), weight=w) for x, y, w in rows[t]] for t in rows}
    result = reference.losses(losses, reference.Rule())
    result |= quality_reference.result(rows) if quality else {}
    return {prefix + key: value for key, value in result.items()}


def run(module: Callable[..., object], batches: Iterable[Rows]) -> None:
    """A forward pass of each batch."""
    for batch in batches:
        module(*batch)


def batches_of(seed: int, count: int = 2) -> list[Rows]:
    return [random_rows(5 + seed % 3 + step, 10 * seed + step) for step in range(count)]


BEFORE, AFTER, EVALUATED = batches_of(1), batches_of(2), batches_of(3, 3)


# A loss.


def test_a_loss_gives_and_resets_all_that_it_tracks_in_its_mode() -> None:
    loss = attached()
    run(loss, BEFORE)
    loss.eval()
    run(loss, EVALUATED)
    for mode, batches in ((True, BEFORE), (False, EVALUATED)):
        loss.train(mode)
        assert_close(numbers(loss.compute()), expected(batches))
        assert_close(numbers(loss.compute_async().wait()), expected(batches))
        assert_close(numbers(compute_all(loss)), expected(batches))
    loss.reset()
    assert (loss.eval_metric.update_count, loss.eval_quality.update_count) == (0, 0)
    loss.train()
    assert_close(numbers(loss.compute()), expected(BEFORE))


def test_a_loss_without_a_quality_gives_its_losses_and_one_of_one_task_its_loss() -> None:
    loss, one = attached(quality=False), Loss("bce_with_logits")
    run(loss, BEFORE)
    one(BEFORE[0].logits[:, 0], BEFORE[0].labels[:, 0])
    assert_close(numbers(loss.compute()), expected(BEFORE, quality=False))
    assert_close(numbers(one.compute()), {"loss": expected(BEFORE[:1])[f"loss/{TASKS[0]}"]})


def test_a_loss_that_had_no_rows_in_its_mode_is_asked_for_it() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS)
    run(loss, BEFORE)
    loss.eval()
    with pytest.warns(UserWarning, match=r"eval_metric of a loss, and train_metric has 2 updates .* put into eval\(\)"):
        assert all(math.isnan(value) for value in numbers(loss.compute()).values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_of_a_loss_has_sums_of_its_own(duplicate: Callable[[MultiTaskLoss], MultiTaskLoss]) -> None:
    loss = attached()
    run(loss, BEFORE)
    twin = duplicate(loss)
    run(twin, AFTER)
    assert_close(numbers(compute_all(twin, reset=True)), expected([*BEFORE, *AFTER]))
    assert_close(numbers(loss.compute()), expected(BEFORE))


# A module.


class Ratio(TaskMetric):
    """A metric of one's own, of which ``name`` is in neither the sums nor the settings."""

    def __init__(self, name: str = "ratio", make: Callable[[Tensor], Any] = Tensor.unbind, **options: Any) -> None:
        super().__init__(["a", "b"], sums=2, **options)
        self.name = name
        self.make = make

    def update(self, values: Tensor) -> None:
        """Add rows ``(rows, 2)``."""
        self._add(self._sum_batch(values))

    def _sum_batch(self, values: Tensor) -> Sequence[Tensor | float]:
        return values.sum(0), len(values)

    def _keys(self) -> dict[str, bool | None]:
        return {f"{self.name}/a": None, f"{self.name}/b": None}

    def _results(self, sums: Tensor) -> Sequence[Tensor]:
        made: Sequence[Tensor] = self.make(sums[0] / sums[1])
        return made


class Model(nn.Module):
    """A model with losses, one of them twice, and metrics, some of them of others."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = attached()
        self.heads = nn.ModuleDict({"again": self.loss, "linear": nn.Linear(1, 1)})
        self.other = Loss("bce_with_logits")
        self.ratios = MetricCollection({"x": Ratio("x"), "y": Ratio("y"), "mean": MeanMetric()}, prefix="val_")
        self.mean = MeanMetric()
        self.least = MinMaxMetric(GlobalLoss(None).scalar("loss"))
        self.tracker = MetricTracker(GlobalLoss(["tracked"]))
        self.view = self.loss.train_metric.scalar("loss")


def test_a_module_gives_all_losses_and_metrics_of_ours_in_it_each_once() -> None:
    model = Model()
    model.other.eval()
    others = [model.mean, model.least, model.tracker]
    model.tracker.increment()
    model.tracker.update(torch.ones(1), 1)
    model.mean.update(3.0)
    model.least.update(torch.ones(()), 1)
    run(model.loss, BEFORE)
    model.other(torch.zeros(3), torch.ones(3))
    model.ratios.update(torch.tensor([[1.0, 4.0], [2.0, 5.0]]))
    before = [numbers_of(each) for each in others]
    # Each has "loss" for a key.
    with pytest.raises(ValueError, match=r"^metrics: got \['loss'\] of more than one metric, .*pass a mapping"):
        compute_all(model)
    del model.other
    ratios = {"x/a": 1.5, "x/b": 4.5, "y/a": 1.5, "y/b": 4.5}
    assert_close(numbers(compute_all(model, reset=True)), {**expected(BEFORE), **ratios})
    assert [numbers_of(each) for each in others] == before
    assert [model.loss.train_metric.update_count, *(model.ratios[name].update_count for name in "xy")] == [0, 0, 0]
    assert model.ratios["mean"].compute() == 3.0


def numbers_of(metric: Any) -> Any:
    """What a metric of another kind gives."""
    found = metric.compute()
    return numbers(found) if isinstance(found, dict) else found.item()


def test_a_mapping_names_modules_and_metrics_and_each_loss_is_of_its_own_mode() -> None:
    train, val, ratio = attached(), attached(), fed(Ratio(), [(torch.ones(2, 2),)])
    run(train, BEFORE)
    val.eval()
    run(val, EVALUATED)
    found = compute_all({"train": nn.ModuleList([train]), "val": val, "idle": train.train_quality, "m": ratio})
    own = {f"idle/{key}": value for key, value in quality_reference.result(columns(BEFORE)).items()}
    oracle = {**expected(BEFORE, "train/"), **expected(EVALUATED, "val/"), **own, "m/ratio/a": 1.0, "m/ratio/b": 1.0}
    assert_close(numbers(found), oracle)
    assert all(
        (v.shape, v.dtype, v.device.type, v.requires_grad) == ((), torch.float64, "cpu", False) for v in found.values()
    )


def test_a_metric_of_the_mode_that_a_loss_is_not_in_can_be_asked_for_itself() -> None:
    loss = MultiTaskLoss("bce_with_logits", TASKS)
    run(loss, BEFORE)
    loss.eval()
    run(loss, EVALUATED)
    found = compute_all({"train": loss.train_metric, "eval": loss.eval_metric})
    assert_close(
        numbers(found), {**expected(BEFORE, "train/", quality=False), **expected(EVALUATED, "eval/", quality=False)}
    )


@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 4)), min_size=1, max_size=5))
def test_any_metrics_give_what_each_gives(chosen: list[tuple[str, int]]) -> None:
    kinds = {
        f"{place}": (KINDS[name], KINDS[name].batches(1 + count, seed=place))
        for place, (name, count) in enumerate(chosen)
    }
    metrics = {name: fed(kind.make(), batches) for name, (kind, batches) in kinds.items()}
    oracle = {
        f"{name}/{key}": v for name, (kind, batches) in kinds.items() for key, v in kind.expected(batches).items()
    }
    assert_close(numbers(compute_all(metrics)), oracle)
    assert_close(numbers(compute_all_async(metrics, reset=True).wait()), oracle)
    assert [metric.update_count for metric in metrics.values()] == [0] * len(metrics)


MADE: dict[str, Callable[[Tensor], Any]] = {
    "float32": lambda values: values.float().unbind(),
    "numbers": Tensor.tolist,
    "one element": lambda values: values.split(1),
    "a tensor": lambda values: values,
    "with a gradient": lambda values: [nn.Parameter(value) for value in values],
}


@pytest.mark.parametrize("name", MADE)
def test_what_a_metric_of_ones_own_gives_is_0_dim_float64(name: str) -> None:
    make, tolerance = MADE[name], 1e-7 if name == "float32" else 1e-15
    found = compute_all(fed(Ratio(make=make), [(torch.tensor([[0.5, 2.0], [0.7, 3.0]], dtype=torch.float64),)]))
    assert numbers(found) == pytest.approx({"ratio/a": 0.6, "ratio/b": 2.5}, rel=tolerance)
    assert all((v.shape, v.dtype, v.requires_grad) == ((), torch.float64, False) for v in found.values())


@pytest.mark.parametrize("shape", [(2,), (1, 2), (0,)])
def test_a_metric_of_ones_own_that_gives_no_single_numbers_is_an_error(shape: tuple[int, ...]) -> None:
    """And never another's number."""
    metric = fed(Ratio(make=lambda values: [values.new_zeros(shape)] * 2), [(torch.ones(1, 2),)])
    with pytest.raises(ValueError, match=rf"^_results: got a value of shape {re.escape(str(shape))}, expected a 0-dim"):
        compute_all(metric, reset=True)
    assert metric.update_count == 1


def test_a_compute_group_of_a_collection_has_the_sums_of_all_before_and_after() -> None:
    """One of its metrics is updated for all."""
    ratios = MetricCollection({"x": Ratio("x"), "y": Ratio("y")})
    model, failing = (
        nn.ModuleDict({"ratios": ratios}),
        fed(GlobalLoss(["c"], nan_strategy="error"), [(torch.tensor([math.nan]), 1)]),
    )
    values = [torch.tensor([[float(step), 1.0]]) for step in range(6)]
    for each in values[:2]:
        ratios.update(each)
    assert [len(group) for group in ratios.compute_groups.values()] == [2]
    assert numbers(compute_all(model)) == {"x/a": 0.5, "x/b": 1.0, "y/a": 0.5, "y/b": 1.0}
    ratios.update(values[2])
    with pytest.raises(RuntimeError, match="not finite"):
        compute_all({"model": model, "c": failing}, reset=True)
    ratios.update(values[3])
    assert numbers(compute_all(model, reset=True)) == {"x/a": 1.5, "x/b": 1.0, "y/a": 1.5, "y/b": 1.0}
    for each in values[4:]:
        ratios.update(each)
    assert numbers(compute_all(model)) == {"x/a": 4.5, "x/b": 1.0, "y/a": 4.5, "y/b": 1.0}


@pytest.mark.usefixtures("new_compiler")
def test_a_compiled_model_is_asked_like_any_other_and_a_reset_recompiles_nothing() -> None:
    loss = attached()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            batch = random_rows(6, seed)
            compiled(*batch)
            assert_close(numbers(compute_all(compiled, reset=True)), expected([batch]))


# What is refused, with nothing changed.

REFUSED: dict[str, tuple[Callable[[GlobalLoss], Any], type[Exception], str]] = {
    "a list": (lambda m: [m], TypeError, "metrics: got list, expected a module, a metric or a mapping of these"),
    "None": (lambda _: None, TypeError, "metrics: got NoneType, expected"),
    "a mapping within": (lambda m: {"a": m, "b": {"c": m}}, TypeError, "metrics: got str -> dict, expected names"),
    "a number for a name": (lambda m: {"a": m, 1: m}, TypeError, "metrics: got int -> GlobalLoss, expected names"),
    "no module": (lambda m: {"a": m, "b": 1.0}, TypeError, "metrics: got str -> float, expected names"),
    "an empty mapping": (lambda _: {}, ValueError, "metrics: got an empty mapping, expected names"),
    "a module without any": (lambda _: nn.Linear(1, 1), ValueError, "metrics: got Linear, expected a Loss"),
    "another metric": (lambda m: {"a": m, "b": MeanMetric()}, ValueError, "metrics['b']: got MeanMetric, expected"),
    "a view": (lambda m: {"a": m, "b": m.scalar("loss")}, ValueError, "metrics['b']: got ScalarView, expected"),
    "equal keys": (
        lambda m: nn.ModuleList([m, fed(GlobalLoss(["b"]), [(torch.ones(1), 1)])]),
        ValueError,
        "metrics: got ['loss'] of more than one metric, expected each key once: pass a mapping name -> metric",
    ),
    "equal keys by names": (
        lambda m: {"a": nn.ModuleList([Named("b/c")]), "a/b": Named("c"), "m": m},
        ValueError,
        "metrics: got ['a/b/c/a', 'a/b/c/b'] of more than one metric",
    ),
}


def Named(name: str) -> Ratio:  # noqa: N802
    return fed(Ratio(name), [(torch.ones(1, 2),)])


@pytest.mark.parametrize(("of", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("call", [compute_all, compute_all_async])
def test_what_is_refused_changes_nothing(
    of: Callable[[GlobalLoss], Any], error: type[Exception], message: str, call: Any
) -> None:
    metric = fed(GlobalLoss(["a"]), [(torch.ones(1), 2)])
    with pytest.raises(error) as caught:
        call(of(metric), reset=True)
    assert str(caught.value).startswith(message)
    with pytest.raises(TypeError, match=r"^reset: got int, expected a bool"):
        call(metric, reset=1)
    assert numbers(metric.compute()) == {"loss/a": 0.5, "loss": 0.5}


def test_between_sync_and_unsync_no_sums_start_anew() -> None:
    first, synced = (
        fed(GlobalLoss([name], distributed_available_fn=lambda: True), [(torch.ones(1), 2)]) for name in "ab"
    )
    metrics = {"x": first, "y": synced}
    synced.sync()
    with pytest.raises(TorchMetricsUserError, match=r"compute_all\(\) with reset=True between sync\(\) and unsync"):
        compute_all(metrics, reset=True)
    assert compute_all(metrics)["y/loss"] == 0.5
    synced.unsync()
    assert numbers(compute_all(metrics, reset=True)) == {"x/loss/a": 0.5, "x/loss": 0.5, "y/loss/b": 0.5, "y/loss": 0.5}


def test_a_reduction_that_can_not_be_copied_is_refused_for_a_later_result_alone() -> None:
    module: Any = nn.Identity()
    module.lock, module.forward = threading.Lock(), lambda losses: losses.sum()
    metric = fed(GlobalLoss(["a", "b"], "mean", module), [(torch.ones(2), 2)])
    with pytest.raises(TypeError, match=r"^global_reduction: got a module that can't be copied"):
        compute_all_async(metric, reset=True)
    assert compute_all(metric)["loss"] == 1.0


# Sums that start anew.


@of_every_kind
def test_with_reset_each_row_is_in_one_result(kind: Kind) -> None:
    batches, metric = kind.batches(6), kind.make()
    for step, batch in enumerate(batches):
        metric.update(*batch)
        if step % 2:
            found = compute_all({"a": metric, "b": metric}, reset=True)
            oracle = kind.expected(batches[step - 1 : step + 1])
            for prefix in "ab":
                assert_close({key: found[f"{prefix}/{key}"].item() for key in oracle}, oracle)
            assert (metric.update_count, metric.totals.any().item()) == (0, False)
    pending = compute_all_async(fed(metric, batches[:2]), reset=True)
    fed(metric, batches[2:])
    assert_close(numbers(pending.wait()), kind.expected(batches[:2]))
    expect_result_of(kind, metric, batches[2:])


class Failing(TaskMetric):
    """A metric whose result does something first, and is then an error."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        super().__init__(None, sums=1)
        self.first = first
        self.update()

    def update(self) -> None:
        """Add a row."""
        self._add((torch.ones(1),))

    def _keys(self) -> dict[str, bool | None]:
        return {"failing": None}

    def _results(self, _: Tensor) -> Sequence[Tensor]:
        self.first()
        raise ZeroDivisionError


def fail(metric: nn.Module, first: Callable[[], object] = lambda: None) -> None:
    """A call that is an error, before which something happens to the metric, as in another thread."""
    with pytest.raises(ZeroDivisionError):
        compute_all({"metric": metric, "failing": Failing(first)}, reset=True)


@of_every_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_after_an_error_the_sums_are_what_they_were(kind: Kind, mode: Callable[[], Any]) -> None:
    """Those of this process, and those that it carries from a checkpoint."""
    batches = kind.batches(5)
    metric = persistent(kind)
    metric.load_state_dict(fed(persistent(kind), batches[:2]).state_dict())
    fed(metric, batches[2:4])
    totals, result = metric.totals.clone(), numbers(metric.compute())
    with mode():
        fail(metric)
    assert torch.equal(metric.totals, totals)
    assert repr(numbers(metric.compute())) == repr(result)
    metric.update(*batches[4])
    assert metric.update_count == 5
    assert_close(numbers(compute_all(metric, reset=True)), numbers(fed(kind.make(), batches).compute()))
    assert not metric.totals.any()


@of_every_kind
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_was_added_meanwhile_comes_after_what_there_was(kind: Kind, count: int) -> None:
    """In a window, too, which ends that many updates later."""
    batches = kind.batches(7)
    metric, done = fed(kind.make(), batches[:3]), batches[3 : 3 + count]
    fail(metric, lambda: fed(metric, done))
    expect_result_of(kind, metric, [*batches[:3], *done])
    fed(metric, batches[3 + count :])
    expect_result_of(kind, metric, batches)
    assert metric.update_count == 7


MEANWHILE: dict[str, Callable[[Any, Any], object]] = {
    "a reset": lambda metric, _: metric.reset(),
    "a checkpoint": lambda metric, saved: metric.load_state_dict(saved),
    "the meta device": lambda metric, _: metric.to("meta").to_empty(device="cpu"),
}


@of_every_kind
@pytest.mark.parametrize("name", MEANWHILE)
def test_an_error_brings_nothing_back_that_was_reset_meanwhile(kind: Kind, name: str) -> None:
    batches = kind.batches(5)
    saved = fed(persistent(kind), batches[2:3])
    metric = fed(persistent(kind), batches[:2])
    view = metric.scalar(metric.keys()[0])

    def meanwhile() -> None:
        metric.update(*batches[2])
        MEANWHILE[name](metric, saved.state_dict())
        fed(metric, batches[3:])

    fail(metric, meanwhile)
    oracle = kind.expected(batches[2 if name == "a checkpoint" else 3 :])
    assert_close(numbers(metric.compute()), oracle)
    assert view.compute().item() == pytest.approx(next(iter(oracle.values())), rel=1e-12)


@of_every_kind
def test_a_call_that_succeeds_meanwhile_has_its_rows_and_leaves_the_others(kind: Kind) -> None:
    batches, inner = kind.batches(5), []
    metric = fed(kind.make(), batches[:2])

    def meanwhile() -> None:
        fed(metric, batches[2:4])
        inner.append(numbers(compute_all(metric, reset=True)))

    fail(metric, meanwhile)
    assert_close(inner[0], kind.expected(batches[2:4]))
    expect_result_of(kind, fed(metric, batches[4:]), [*batches[:2], batches[4]])


@of_every_kind
def test_views_start_anew_with_the_sums_and_go_on_after_an_error(kind: Kind) -> None:
    batches = kind.batches(6)
    key = kind.make().keys()[0]

    def expect(view: Any, rows: list[Batch]) -> None:
        assert view.compute().item() == pytest.approx(kind.expected(rows)[key], rel=1e-11)

    metric = fed(kind.make(), batches[:1])
    early, whole = metric.scalar(key), metric.scalar(key)
    early.reset()
    fed(metric, batches[1:3])
    meanwhile = metric.scalar(key)

    def reset_a_view() -> None:
        metric.update(*batches[3])
        meanwhile.reset()

    fail(metric, reset_a_view)
    expect(early, batches[1:4])
    expect(whole, batches[:4])
    compute_all(metric, reset=True)
    fed(metric, batches[4:])
    for view in (early, whole, meanwhile):
        expect(view, batches[4:])


def test_one_metric_that_is_not_finite_keeps_the_sums_of_all() -> None:
    good, bad = fed(GlobalLoss(["a"]), [(torch.ones(1), 2)]), GlobalLoss(["b"], nan_strategy="error")
    fed(bad, [(torch.ones(1), 4), (torch.tensor([math.nan]), 1)])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^GlobalLoss: skipped updates that were not finite: b: 1$"):
            compute_all({"good": good, "bad": bad}, reset=True)
    bad.nan_strategy = "ignore"
    found = numbers(compute_all({"good": good, "bad": bad}, reset=True))
    assert found == {"good/loss/a": 0.5, "good/loss": 0.5, "bad/loss/b": 0.25, "bad/loss": 0.25}
    assert (good.update_count, bad.update_count) == (0, 0)


def test_a_metric_of_the_meta_device_is_an_error_that_takes_no_sums() -> None:
    with torch.device("meta"):
        unmade = GlobalLoss(["a"])
    metric = fed(GlobalLoss(["a"]), [(torch.ones(1), 2)])
    with pytest.raises(NotImplementedError):
        compute_all({"x": metric, "y": unmade}, reset=True)
    assert metric.compute()["loss"] == 0.5


def test_merged_sums_are_computed_and_start_anew() -> None:
    kind = KINDS["qualities with a window"]
    ours, theirs = kind.batches(3), kind.batches(2, seed=10)
    metric = fed(kind.make(), ours)
    metric.merge_state(fed(kind.make(), theirs))
    assert_close(numbers(compute_all(metric, reset=True)), kind.expected(ours, theirs, of=1))
    assert not metric.totals.any()


@pytest.mark.filterwarnings("ignore:.*before update")
@pytest.mark.parametrize("is_async", [False, True])
def test_no_row_is_lost_or_counted_twice_while_threads_add_some(is_async: bool) -> None:
    """Nor where every other call is an error."""
    threads, updates = 3, 300
    metrics = {name: GlobalLoss([name], "sum") for name in "ab"}
    pairs = RankingQuality(["c"], window=2)
    barrier = threading.Barrier(threads + 1)

    def add(name: str) -> None:
        barrier.wait()
        for _ in range(updates):
            metrics[name].update(torch.ones(1, dtype=torch.float64), 1)
            pairs.update(torch.zeros(1, 1), torch.ones(1, 1))

    running = [threading.Thread(target=add, args=("ab"[index % 2],)) for index in range(threads)]
    for each in running:
        each.start()
    barrier.wait()
    total: dict[str, float] = {"a/loss": 0.0, "b/loss": 0.0, "c/weight/c": 0.0}
    given: dict[str, nn.Module] = {**metrics, "c": pairs}
    rounds = 0
    while rounds < 20 or any(each.is_alive() for each in running):
        rounds += 1
        if not is_async:
            with pytest.raises(ZeroDivisionError):
                compute_all({**given, "failing": Failing()}, reset=True)
        count(total, given, is_async=is_async)
    for each in running:
        each.join()
    count(total, given, is_async=is_async)
    assert total == {"a/loss": 2.0 * updates, "b/loss": 1.0 * updates, "c/weight/c": threads * updates}


@pytest.mark.filterwarnings("ignore:.*before update")
def test_no_row_is_lost_while_a_thread_runs_compiled_steps() -> None:
    """One of them may have looked the sums up before they were started anew, and adds to them after it."""
    loss, one, steps = MultiTaskLoss("given", ["a"], "sum", "sum", global_batch=True), torch.ones(1), 2000
    step = torch.compile(lambda sums: loss.from_sums(sums, 1)["loss"], backend="eager", fullgraph=True)
    step(one)
    loss.reset()
    running = threading.Thread(target=lambda: [step(one) for _ in range(steps)])
    running.start()
    total = 0.0
    while running.is_alive():
        total += compute_all(loss, reset=True)["loss"].nan_to_num().item()
    running.join()
    assert total + compute_all(loss, reset=True)["loss"].nan_to_num().item() == steps


def count(total: dict[str, float], metrics: dict[str, nn.Module], *, is_async: bool) -> None:
    """Add what came since the last call."""
    found = compute_all_async(metrics, reset=True).wait() if is_async else compute_all(metrics, reset=True)
    for key in total:
        value = found[key].item()
        total[key] += 0.0 if math.isnan(value) else value


# Nothing waits for a device.


def test_a_call_for_a_later_result_copies_no_numbers_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's host would wait for all that it has to do before."""
    metrics = {
        name: fed(kind.make(distributed_available_fn=lambda: True), kind.batches(2)) for name, kind in KINDS.items()
    }

    def copying(*_: Any, **__: Any) -> Tensor:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", copying)
        pending = compute_all_async(metrics, reset=True)
    for name, kind in KINDS.items():
        oracle = kind.expected(kind.batches(2))
        assert_close({key: pending.wait()[f"{name}/{key}"].item() for key in oracle}, oracle)
