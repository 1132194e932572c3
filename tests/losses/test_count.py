"""``count``: what forward divides by, of labels and weights alone, whatever form they have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from benchmarks.counts import CollectiveLog, KernelLog
from tests.support import reference
from tests.support.metrics import weights_of
from tests.support.mixed import Batch, Mixed, Ranker, mixed_cases, squared
from tests.support.refusals import expect_refusal, sums_of
from tests.support.tiers import dozens
from twloss import Loss, MultiTaskLoss, _precision

TASKS = ["like", "watch time", "topic"]
NAN = math.nan


def loop(
    labels: Sequence[Any], weights: Sequence[float] | None, ignore_index: float | None = None, mean_over: str = "rows"
) -> float:
    """The divisor of one task, row by row; a label may be a list of labels, all of which have to be there."""
    total = []
    for n, label in enumerate(labels):
        parts = label if isinstance(label, list) else [label]
        if not any(reference.is_missing(part, ignore_index) for part in parts):
            total.append(1.0 if mean_over == "rows" or weights is None else weights[n])
    return math.fsum(total)


def close(counts: Iterable[float]) -> Any:
    return pytest.approx(list(counts), rel=1e-12, abs=0)


def rows_apart(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of labels ``(rows, tasks, 2)``."""
    return (logits - labels).square().sum(-1)


# Against Python loops.


def labels_and_weights(names: Sequence[str], batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """In another order than the tasks'."""
    labels = {task: batch[task].labels for task in reversed(names)}
    return labels, {task: part.weights for task, part in batch.items() if part.weights is not None} or None


@given(mixed_cases(world_size=1))
@dozens(4)
def test_ragged_tasks_of_several_types(case: tuple[Mixed, list[list[Batch]]]) -> None:
    options, steps = case
    loss = options.loss()
    for (batch,) in steps:
        counts = loss.count(*labels_and_weights(options.names(), batch))
        assert counts.dtype == torch.float64
        assert counts.tolist() == close(
            loop(
                part.labels.tolist(),
                None if part.weights is None else part.weights.tolist(),
                (options.ignore_index or {}).get(task),
                options.mean_over,
            )
            for task, part in ((task, batch[task]) for task in options.names())
        )


FORMS = ("none", "(rows, tasks)", "(rows, 1)", "(rows,)", "mapping")
TYPES: dict[str, Any] = {
    "binary": "bce_with_logits",
    "classes": "cross_entropy",
    "callable": squared,
    "callable of further dimensions": rows_apart,
    "several": {"like": "bce_with_logits", "watch time": squared, "topic": "bce_with_logits"},
}


@given(
    kind=st.sampled_from(tuple(TYPES)),
    form=st.sampled_from(FORMS),
    mean_over=st.sampled_from(("rows", "weights")),
    missing=st.sampled_from((None, -1.0, NAN, {"topic": 3.0}, {"like": NAN, "topic": -1.0})),
    rows=st.integers(0, 6),
    by_task=st.booleans(),
    seed=st.integers(0, 2**31),
)
@dozens(8)
def test_tensors_and_mappings_with_weights_in_every_form(
    kind: str, form: str, mean_over: Any, missing: Any, rows: int, by_task: bool, seed: int
) -> None:
    if kind == "classes" and missing not in (None, -1.0):
        missing = -1.0
    ignored = [missing.get(task) if isinstance(missing, dict) else missing for task in TASKS]
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 3, 2) if kind == "callable of further dimensions" else (rows, 3)
    labels = torch.randint(0, 2, shape, generator=generator).double()
    for t, label in enumerate(ignored):
        if label is not None:
            labels[:, t] = labels[:, t].masked_fill(torch.rand(labels[:, t].shape, generator=generator) < 0.4, label)
    labels = labels.long() if kind == "classes" else labels
    full = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    if form in ("(rows, 1)", "(rows,)"):
        full = full[:, :1].expand(rows, 3)
    given_weights: Any = {
        "none": None,
        "(rows, tasks)": full,
        "(rows, 1)": full[:, :1],
        "(rows,)": full[:, 0],
        "mapping": {task: full[:, t] for t, task in enumerate(TASKS)},
    }[form]
    loss = MultiTaskLoss(TYPES[kind], TASKS, mean_over=mean_over, ignore_index=missing)
    of_task = {task: labels[:, t] for t, task in enumerate(TASKS)}
    counts = loss.count(of_task if by_task else labels, given_weights)
    expected = [
        loop(labels[:, t].tolist(), None if form == "none" else full[:, t].tolist(), ignored[t], mean_over)
        for t in range(3)
    ]
    # Weights may cancel.
    assert counts.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0)])
@pytest.mark.parametrize("kind", ["bce_with_logits", "cross_entropy"])
def test_one_task_of_any_shape(kind: Any, shape: tuple[int, ...]) -> None:
    labels, weights = torch.randint(-1, 2, shape), torch.rand(shape)
    flat = labels.flatten().tolist(), weights.flatten().tolist()
    for mean_over in ("rows", "weights"):
        loss = Loss(kind, ignore_index=-1, mean_over=mean_over)
        assert loss.count(labels, weights).tolist() == close([loop(*flat, -1, mean_over)])
        assert loss.count(labels, weights).shape == (1,)
    if shape == (2, 3):
        expected = loop(flat[0], weights[0].tolist() * 2, -1, "weights")
        assert loss.count(labels, weights[0]).tolist() == close([expected])


def test_one_task_for_a_callable() -> None:
    labels = torch.tensor([1.0, NAN, 0.0, 1.0])
    loss = Loss(squared, ignore_index=NAN, mean_over="weights")
    assert loss.count(labels).tolist() == [3.0]
    assert loss.count(labels, torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist() == [13.0]


@pytest.mark.parametrize(
    ("labels", "ignore_index", "count"),
    [
        (torch.tensor([[156], [0]], dtype=torch.uint8), -100, 2),
        (torch.tensor([[255], [0]], dtype=torch.uint8), 255, 1),
        (torch.tensor([[-999.0], [0]], dtype=torch.bfloat16), -999, 1),
        (torch.tensor([[True], [False]]), NAN, 2),
        (torch.tensor([[2**24 + 1], [2**24]]), 2**24, 1),
    ],
    ids=["-100 is 156 in uint8", "255", "-999 is -1000 in bfloat16", "bool", "no float32"],
)
def test_missing_labels_are_looked_for_in_the_dtype_they_came_in(
    labels: Tensor, ignore_index: float, count: float
) -> None:
    assert MultiTaskLoss(squared, ["a"], ignore_index=ignore_index).count(labels).tolist() == [count]
    by_task = {"a": labels[:, 0], "b": torch.zeros(3, dtype=torch.float64)}
    two = MultiTaskLoss(squared, ["a", "b"], ignore_index={"a": ignore_index})
    assert two.count(by_task).tolist() == [count, 3.0]


def test_a_weight_of_a_missing_row_may_be_anything() -> None:
    labels, weights = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[0.5], [NAN], [2.0]])
    loss = MultiTaskLoss("bce_with_logits", ["a"], ignore_index=-1, mean_over="weights")
    assert loss.count(labels, weights).tolist() == [2.5]


def test_many_small_weights_are_added_in_float64() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a"], mean_over="weights")
    weights = torch.full((1025, 1), 1.0, dtype=torch.bfloat16)
    assert loss.count(torch.zeros(1025, 1), weights).tolist() == [1025.0]
    large = torch.tensor([[2**24 + 1]])
    assert loss.count(torch.zeros(1, 1), large).tolist() == [2**24 + 1]


# Against forward.


@given(mixed_cases(world_size=1))
@dozens(2)
def test_as_the_normalizer_of_a_batch_it_changes_nothing(case: tuple[Mixed, list[list[Batch]]]) -> None:
    options, steps = case
    if options.task_loss_reduction != "mean" or options.global_reduction not in ("mean", "sum"):
        return  # refuses a normalizer
    ranker = Ranker(options)
    for (batch,) in steps:
        total = ranker.loss.count(*labels_and_weights(options.names(), batch))
        with_total, without = ranker(batch, total), ranker(batch)
        for key, value in without.items():
            assert with_total[key].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-15)


def test_it_is_the_weight_that_the_running_sums_have() -> None:
    labels = torch.tensor([[1.0, NAN], [0.0, 1.0], [NAN, NAN]])
    weights = torch.tensor([[0.5], [2.0], [3.0]])
    for mean_over in ("rows", "weights"):
        loss = MultiTaskLoss("bce_with_logits", ["a", "b"], ignore_index=NAN, mean_over=mean_over)
        loss(torch.zeros(3, 2), labels, weights)
        assert weights_of(loss.train_metric) == loss.count(labels, weights).tolist()


# What it costs and leaves behind.


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch's own forward mode
@pytest.mark.parametrize("loss_type", ["bce_with_logits", TYPES["several"]], ids=["one type", "several"])
def test_no_gradient_no_collective_and_no_running_sum(loss_type: Any) -> None:
    loss = MultiTaskLoss(loss_type, TASKS, global_batch=True, mean_over="weights", ignore_index=-1)
    labels = torch.rand(4, 3, requires_grad=True)
    weights = torch.rand(4, 3, requires_grad=True)
    before = sums_of(loss)
    with CollectiveLog() as log:
        counts = loss.count(labels, weights)
    assert not counts.requires_grad
    assert log.names == []
    assert sums_of(loss) == before
    assert not loss.train_metric.update_called
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weights.detach(), torch.ones(4, 3))
        assert forward_ad.unpack_dual(loss.count(labels, dual)).tangent is None


@pytest.mark.parametrize("loss_type", ["bce_with_logits", TYPES["several"]], ids=["one type", "several"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [None, -1, {"like": -1.0}])
def test_no_value_is_waited_for(loss_type: Any, weighted: bool, ignore_index: Any) -> None:
    """A meta tensor has no values to read; and it is where the labels are."""
    loss = MultiTaskLoss(loss_type, TASKS, ignore_index=ignore_index, mean_over="weights")
    labels = torch.zeros(4, 3, device="meta")
    counts = loss.count(labels, torch.zeros(4, 1, device="meta") if weighted else None)
    assert (counts.device.type, counts.dtype, counts.shape) == ("meta", torch.float64, (3,))


@pytest.mark.parametrize("ignore_index", [None, -1])
def test_the_number_of_kernels_does_not_depend_on_the_number_of_tasks(ignore_index: Any) -> None:
    found = []
    for tasks in (2, 50):
        loss = MultiTaskLoss(
            "bce_with_logits", [f"task{t}" for t in range(tasks)], ignore_index=ignore_index, mean_over="weights"
        )
        with KernelLog() as log:
            loss.count(torch.zeros(4, tasks), torch.ones(4, tasks))
        found.append(log.names)
    assert found[0] == found[1]


def test_on_a_device_without_float64_it_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_precision.SUM_DTYPES, "cpu", torch.float32)
    loss = MultiTaskLoss("bce_with_logits", ["a"], mean_over="weights")
    for weights in (None, torch.ones(4), torch.ones(4, dtype=torch.float64)):
        counts = loss.count(torch.zeros(4, 1), weights)
        assert (counts.dtype, counts.tolist()) == (torch.float32, [4.0])


# Where torch runs it.


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("loss_type", ["bce_with_logits", TYPES["several"]], ids=["one type", "several"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("ignore_index", [None, NAN])
def test_compiled_it_is_one_graph_for_any_number_of_rows(
    loss_type: Any, weighted: bool, by_task: bool, ignore_index: float | None
) -> None:
    loss = MultiTaskLoss(loss_type, TASKS, mean_over="weights", ignore_index=ignore_index)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss.count, fullgraph=True, backend=counter, dynamic=True)
    for rows in (4, 7, 5, 9):
        labels = torch.rand(rows, 3)
        labels[1] = NAN
        weights = torch.rand(rows, 3) if weighted else None
        given_labels: Any = {task: labels[:, t].clone() for t, task in enumerate(TASKS)} if by_task else labels
        columns = [
            loop(labels[:, t].tolist(), None if weights is None else weights[:, t].tolist(), ignore_index, "weights")
            for t in range(3)
        ]
        assert compiled(given_labels, weights).tolist() == close(columns)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("new_compiler")
def test_a_step_that_counts_for_itself_compiles_in_one_graph() -> None:
    loss = MultiTaskLoss("bce_with_logits", ["a", "b"], ignore_index=NAN)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, labels, normalizer=loss.count(labels))["loss"]

    logits, labels = torch.randn(6, 2, requires_grad=True), torch.rand(6, 2)
    labels[::2, 1] = NAN
    step(logits, labels).backward()
    own = logits.detach().requires_grad_()
    loss(own, labels)["loss"].backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, own.grad, rtol=1e-6, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_type", ["bce_with_logits", TYPES["several"]], ids=["one type", "several"])
def test_in_transforms_of_torch_func(loss_type: Any) -> None:
    loss = MultiTaskLoss(loss_type, TASKS, ignore_index=-1, mean_over="weights")
    labels = torch.rand(2, 5, 3, dtype=torch.float64)
    labels[0, :2, 1] = -1
    weights = torch.rand(2, 5, 3, dtype=torch.float64)
    expected = [loss.count(*each).tolist() for each in zip(labels, weights)]
    assert torch.func.vmap(loss.count)(labels, weights).tolist() == expected
    assert torch.func.vmap(loss.count, in_dims=(0, None))(labels, weights[0]).tolist()[0] == expected[0]
    found = torch.func.grad(lambda w: (loss.count(labels[0], w) * w.sum(0)).sum())(weights[0])
    assert torch.allclose(found, torch.tensor(expected[0], dtype=torch.float64).expand(5, 3), rtol=1e-12)


# What is refused.

BCE = MultiTaskLoss("bce_with_logits", ["a", "b"])
CLASSES = MultiTaskLoss("cross_entropy", ["a", "b"])
FUNCTION = MultiTaskLoss(rows_apart, ["a", "b"])
SEVERAL = MultiTaskLoss({"a": "bce_with_logits", "b": squared}, ["a", "b"])
ZEROS, THREE = torch.zeros(4, 2), torch.zeros(3)


@pytest.mark.parametrize("wrong", [(None,), ([1.0, 0.0],), (ZEROS.to_sparse(),), (ZEROS + 1j,)])
@pytest.mark.parametrize("loss", [BCE, CLASSES, FUNCTION, SEVERAL, Loss("bce_with_logits"), Loss(squared)])
def test_labels_and_weights_that_are_no_tensors(loss: Any, wrong: tuple[Any]) -> None:
    expect_refusal(lambda: loss.count(*wrong), TypeError, "labels: got ", "Tensor", wrong)
    if wrong != (None,):
        given_ = torch.zeros(4, dtype=torch.long) if isinstance(loss, Loss) else ZEROS.long(), *wrong
        expect_refusal(lambda: loss.count(*given_), TypeError, "weights: got ", "Tensor", given_)


@pytest.mark.parametrize(
    ("loss", "arguments", "error", "starts", "expected"),
    [
        (BCE, (torch.zeros(4, 3),), ValueError, "labels: got shape (4, 3)", "(rows, 2)"),
        (BCE, (THREE,), ValueError, "labels: got shape (3,)", "(rows, 2)"),
        (SEVERAL, (torch.zeros(4, 3),), ValueError, "labels: got shape (4, 3)", "(rows, 2)"),
        (FUNCTION, (torch.zeros(4, 3, 2),), ValueError, "labels: got shape (4, 3, 2)", "(rows, 2, …)"),
        (CLASSES, (ZEROS,), TypeError, "labels: got torch.float32", "class indices of an integer dtype"),
        (Loss("cross_entropy"), (ZEROS,), TypeError, "labels: got torch.float32", "class indices"),
        (BCE, (ZEROS, THREE), ValueError, "weights: got shape (3,)", "(4, 2), (4, 1) or (4,)"),
        (SEVERAL, (ZEROS, {"a": torch.zeros(4), "b": THREE}), ValueError, "weights['b']: got 3 rows", "4 as in labels"),
        (BCE, ({"a": THREE},), ValueError, "labels: ", "b"),
        (SEVERAL, ({"a": THREE},), ValueError, "labels: ", "b"),
        (BCE, (ZEROS, {"a": THREE}), ValueError, "weights: ", "b"),
        (
            BCE,
            ({"a": THREE, "b": THREE[:2]}, {"a": THREE, "b": THREE}),
            ValueError,
            "weights['b']: got 3 rows",
            "2 as in labels['b']",
        ),
        (
            BCE,
            ({"a": THREE, "b": THREE[:2]}, torch.ones(3)),
            ValueError,
            "labels: got {'a': 3, 'b': 2} rows",
            "as weights is no mapping",
        ),
        (Loss("bce_with_logits"), (ZEROS, THREE), ValueError, "weights: got shape (3,)", "(4, 2)"),
        (Loss("bce_with_logits"), ({"a": THREE},), TypeError, "labels: got dict", "a Tensor, dense"),
        (Loss(squared), (ZEROS,), ValueError, "labels: got shape (4, 2)", "(rows,), since of one task only the result"),
        (Loss(squared), (ZEROS[:, :1],), ValueError, "labels: got shape (4, 1)", "a MultiTaskLoss of one task takes"),
        (BCE, (ZEROS, ZEROS.to("meta")), ValueError, "weights: got a tensor on meta", "cpu, where the labels are"),
        (
            SEVERAL,
            ({"a": THREE, "b": THREE.to("meta")},),
            ValueError,
            "labels: got ['cpu', 'meta']",
            "the same device for every task",
        ),
    ],
)
def test_a_refusal_names_the_argument(
    loss: Any, arguments: tuple[Any, ...], error: type[Exception], starts: str, expected: str
) -> None:
    before = sums_of(loss)
    expect_refusal(lambda: loss.count(*arguments), error, starts, expected, arguments)
    assert sums_of(loss) == before
