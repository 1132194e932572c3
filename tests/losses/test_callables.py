"""Loss callables: which rows they see, what their mask is, and what of theirs counts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twloss import Loss, MultiTaskLoss

TASKS = ["a", "b"]
# Positive, with labels of different ranges, so that one task's are none of the other's.
LOGITS = [[1.0, 2.0], [0.5, 7.0], [3.0, 1.5], [2.5, 4.0]]
LABELS = [[1.5, 10.0], [0.25, 20.0], [2.0, 10.0], [0.75, 30.0]]
WEIGHTS = [[1.0, 0.0], [0.0, 2.0], [0.5, 1.5], [2.0, 1.0]]
ABSENT = [(2, 0), (0, 1), (3, 1)]
"""Where labels are missing, in the tests with missing labels."""
ALL = [(n, t) for n in range(4) for t in range(2)]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def multi_task(function: Any, missing: float | None = None) -> MultiTaskLoss:
    return MultiTaskLoss(function, TASKS, ignore_index=missing)


def single(function: Any, missing: float | None = None) -> Loss:
    return Loss(function, ignore_index=missing)


def batch(missing: float | None = None, *, weighted: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    labels = tensor(LABELS)
    for n, t in ABSENT if missing is not None else ():
        labels[n, t] = -1.0 if missing is None else missing
    return tensor(LOGITS).requires_grad_(), labels, tensor(WEIGHTS) if weighted else None


def is_label(n: int, t: int, missing: float | None) -> bool:
    return missing is None or (n, t) not in ABSENT


def weight(n: int, t: int, weighted: bool) -> float:
    return WEIGHTS[n][t] if weighted else 1.0


every_batch = pytest.mark.parametrize(
    ("missing", "weighted"), [(None, False), (None, True), (-1.0, False), (-1.0, True), (math.nan, True)]
)


class Scaled(nn.Module):
    """A loss with a parameter; of a logit or a label that is not positive it is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(tensor(2.0))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The squared difference of the logarithms."""
        return 0.5 * ((logits.log() - labels.log()) / self.scale) ** 2


def scaled_terms(missing: float | None, weighted: bool, power: int) -> list[list[float]]:
    """By task: weight times squared difference of logarithms, over so many powers of the scale, where it counts."""
    return [
        [
            weight(n, t, weighted) * 0.5 * (math.log(LOGITS[n][t]) - math.log(LABELS[n][t])) ** 2 / 2.0**power
            for n in range(4)
            if is_label(n, t, missing)
        ]
        for t in range(2)
    ]


@every_batch
def test_the_gradient_by_a_parameter_is_the_sum_over_the_rows_that_count(missing: float | None, weighted: bool) -> None:
    scaled = Scaled()
    result = multi_task(scaled, missing)(*batch(missing, weighted=weighted))["loss"]
    (found,) = torch.autograd.grad(result, scaled.scale)
    value = sum(math.fsum(rows) / len(rows) for rows in scaled_terms(missing, weighted, 2)) / 2
    slope = sum(-2 * math.fsum(rows) / len(rows) for rows in scaled_terms(missing, weighted, 3)) / 2
    assert result.item() == pytest.approx(value, rel=1e-12)
    assert found.item() == pytest.approx(slope, rel=1e-12)


@every_batch
@pytest.mark.parametrize("t", [0, 1])
def test_a_single_loss_has_that_gradient_too(missing: float | None, weighted: bool, t: int) -> None:
    scaled = Scaled()
    logits, labels, weights = batch(missing, weighted=weighted)
    loss = single(scaled, missing)
    result = loss(logits[:, t], labels[:, t], None if weights is None else weights[:, t])
    (found,) = torch.autograd.grad(result, scaled.scale)
    rows = scaled_terms(missing, weighted, 3)[t]
    assert found.item() == pytest.approx(-2 * math.fsum(rows) / len(rows), rel=1e-12)


@pytest.mark.parametrize("missing", [-1.0, math.nan])
def test_a_task_whose_labels_are_all_missing_adds_nothing(missing: float) -> None:
    """No label of the task is at hand, and the gradient by the parameter is finite all the same."""
    scale = tensor(2.0).requires_grad_()
    loss = multi_task(lambda x, y: (x - y).square() / scale, missing)
    logits, labels, _ = batch()
    labels[:, 1] = missing
    losses = loss(logits, labels)
    by_logit, by_scale = torch.autograd.grad(losses["loss"], (logits, scale))
    squares = math.fsum((xs[0] - ys[0]) ** 2 for xs, ys in zip(LOGITS, LABELS)) / 4
    assert losses["loss/b"].item() == 0.0
    assert losses["loss"].item() == pytest.approx(squares / 2, rel=1e-12)
    assert (by_logit[:, 1] == 0).all()
    assert by_scale.item() == pytest.approx(-squares / 4, rel=1e-12)


class Seen:
    """A callable that keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A squared error."""
        self.given = [logits.detach().clone(), labels.detach().clone()]
        return (logits - labels).square()


@pytest.mark.parametrize("missing", [None, -1.0, math.nan])
def test_a_callable_sees_rows_as_they_are(missing: float | None) -> None:
    """Those of weight 0 too; a missing label is replaced by one of its task."""
    seen = Seen()
    logits, labels, weights = batch(missing)
    multi_task(seen, missing)(logits, labels, weights)
    assert seen.given[0].tolist() == LOGITS
    for n, t in ALL:
        found = seen.given[1][n, t].item()
        if is_label(n, t, missing):
            assert found == LABELS[n][t]
        else:
            assert found in [LABELS[k][t] for k in range(4) if is_label(k, t, missing)]


def test_a_single_loss_of_any_shape_shows_rows_as_they_are() -> None:
    seen = Seen()
    labels = tensor([[[1.0, 2.0], [math.nan, 4.0]]])
    weights = tensor([[[0.0, 1.0], [1.0, 1.0]]])
    result = single(seen, math.nan)(torch.zeros(1, 2, 2, dtype=torch.float64), labels, weights)
    assert (seen.given[0] == 0).all()
    given = seen.given[1].flatten().tolist()
    assert [given[0], given[1], given[3]] == [1.0, 2.0, 4.0]
    assert given[2] in (1.0, 2.0, 4.0)
    assert result.item() == pytest.approx((4.0 + 16.0) / 3, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_loss_in_a_dtype_of_the_callables_own_is_summed_in_that_of_the_logits(
    dtype: torch.dtype, weighted: bool
) -> None:
    """As autocast makes it; in bfloat16 a sum of 1025 ones is 1024, and in float16 one of 70,000 is infinite."""
    logits = torch.ones(70_000, 2, requires_grad=True)
    weights = torch.ones(70_000, 2) if weighted else None

    def own_dtype(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - labels).to(dtype)

    for loss in (
        multi_task(own_dtype)(logits, torch.zeros(70_000, 2), weights)["loss"],
        single(own_dtype)(logits, torch.zeros(70_000, 2), weights),
    ):
        assert (loss.dtype, loss.item()) == (torch.float32, 1.0)


def test_mappings_have_labels_of_their_own_task_too() -> None:
    seen = Seen()
    loss = multi_task(seen, -1)
    logits, labels, _ = batch(-1.0, weighted=False)
    losses = loss(dict(zip(TASKS, logits.unbind(1))), dict(zip(TASKS, labels.unbind(1))))
    squares = [[(LOGITS[n][t] - LABELS[n][t]) ** 2 for n in range(4) if is_label(n, t, -1.0)] for t in range(2)]
    found = [losses["loss/a"].item(), losses["loss/b"].item()]
    assert found == pytest.approx([math.fsum(rows) / len(rows) for rows in squares], rel=1e-12)


def root(logits: Tensor, labels: Tensor) -> Tensor:
    """Infinitely steep where a logit is its label."""
    return (logits - labels).abs().sqrt()


def test_a_derivative_that_is_not_finite_at_a_masked_row_is_0() -> None:
    logits, labels, weights = batch(-1.0)
    assert weights is not None
    with torch.no_grad():
        logits[1, 0] = labels[1, 0]  # of weight 0
        logits[0, 1] = 10.0  # may become its label, which is missing
    (found,) = torch.autograd.grad(multi_task(root, -1)(logits, labels, weights)["loss"], logits)
    counts = [sum(is_label(n, t, -1.0) for n in range(4)) for t in range(2)]
    for n, t in ALL:
        if is_label(n, t, -1.0) and WEIGHTS[n][t] != 0:
            difference = LOGITS[n][t] - LABELS[n][t]
            slope = math.copysign(0.5 / math.sqrt(abs(difference)), difference)
            assert found[n, t].item() == pytest.approx(WEIGHTS[n][t] * slope / (2 * counts[t]), rel=1e-12)
        else:
            assert found[n, t].item() == 0.0


def coupled(logits: Tensor, labels: Tensor) -> Tensor:
    """Listwise, over all rows that there are."""
    return -labels * logits.log_softmax(0)


def test_rows_that_a_callable_couples_get_no_gradient_where_they_are_masked() -> None:
    """They take part in the softmax all the same."""
    logits, labels, weights = batch()
    losses = multi_task(coupled)(logits, labels, weights)
    (found,) = torch.autograd.grad(losses["loss"], logits)
    for t in range(2):
        total = math.fsum(math.exp(row[t]) for row in LOGITS)
        terms = [w[t] * y[t] for w, y in zip(WEIGHTS, LABELS)]
        value = math.fsum(-term * (x[t] - math.log(total)) for term, x in zip(terms, LOGITS)) / 4
        assert losses[f"loss/{TASKS[t]}"].item() == pytest.approx(value, rel=1e-12)
        for n in range(4):
            slope = -terms[n] + math.fsum(terms) * math.exp(LOGITS[n][t]) / total
            assert found[n, t].item() == (0.0 if WEIGHTS[n][t] == 0 else pytest.approx(slope / 8, rel=1e-12))


# A mask for those that ask for it.


def listwise(logits: Tensor, labels: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """Over the rows that count."""
    scores = (logits / temperature).masked_fill(~valid, -math.inf).log_softmax(0)
    return -labels.masked_fill(~valid, 0.0) * scores.masked_fill(~valid, 0.0)


def with_keyword_only(logits: Tensor, labels: Tensor, *, valid: Tensor) -> Tensor:
    return listwise(logits, labels, valid)


def with_default(logits: Tensor, labels: Tensor, size_average: None = None, valid: Tensor | None = None) -> Tensor:
    assert valid is not None
    return listwise(logits, labels, valid)


class Listwise(nn.Module):
    """A module."""

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """As the function."""
        return listwise(logits, labels, valid)


class Object:
    """Neither a function nor a module."""

    def __call__(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """As the function."""
        return listwise(logits, labels, valid)

    def method(self, logits: Tensor, labels: Tensor, *, valid: Tensor) -> Tensor:
        """As the function."""
        return listwise(logits, labels, valid)


FORMS: dict[str, Callable[[], Any]] = {
    "function": lambda: listwise,
    "keyword-only": lambda: with_keyword_only,
    "default": lambda: with_default,
    "partial": lambda: functools.partial(listwise, temperature=1.0),
    "partial of keyword-only": lambda: functools.partial(with_keyword_only),
    "lambda": lambda: lambda x, y, *, valid: listwise(x, y, valid),
    "module": Listwise,
    "object": Object,
    "method": lambda: Object().method,
}


def listwise_oracle(missing: float | None, weighted: bool, t: int) -> tuple[float, list[float]]:
    """A task's loss, and its derivative by each logit."""
    present = [n for n in range(4) if is_label(n, t, missing)]
    rows = [n for n in present if weight(n, t, weighted) != 0]
    total = math.fsum(math.exp(LOGITS[n][t]) for n in rows)
    terms = {n: weight(n, t, weighted) * LABELS[n][t] for n in rows}
    value = math.fsum(-terms[n] * (LOGITS[n][t] - math.log(total)) for n in rows) / len(present)
    slopes = [0.0] * 4
    for n in rows:
        slopes[n] = (math.fsum(terms.values()) * math.exp(LOGITS[n][t]) / total - terms[n]) / len(present)
    return value, slopes


def expect_listwise(function: Any, missing: float | None, weighted: bool) -> None:
    loss = multi_task(function, missing)
    logits, labels, weights = batch(missing, weighted=weighted)
    losses = loss(logits, labels, weights)
    (found,) = torch.autograd.grad(losses["loss"], logits)
    for t, task in enumerate(TASKS):
        value, slopes = listwise_oracle(missing, weighted, t)
        assert losses[f"loss/{task}"].item() == pytest.approx(value, rel=1e-12)
        assert found[:, t].tolist() == pytest.approx([slope / 2 for slope in slopes], rel=1e-12, abs=1e-15)
        assert [n for n in range(4) if found[n, t] == 0] == [n for n in range(4) if slopes[n] == 0]


@every_batch
@pytest.mark.parametrize("form", FORMS)
def test_a_listwise_loss_over_the_rows_that_count(form: str, missing: float | None, weighted: bool) -> None:
    expect_listwise(FORMS[form](), missing, weighted)


def test_a_compiled_module_is_asked_too(new_compiler: None) -> None:
    expect_listwise(torch.compile(Listwise(), backend="eager"), -1.0, weighted=True)


@every_batch
@pytest.mark.parametrize("t", [0, 1])
def test_a_listwise_single_loss(missing: float | None, weighted: bool, t: int) -> None:
    logits, labels, weights = batch(missing, weighted=weighted)
    loss = single(listwise, missing)
    result = loss(logits[:, t], labels[:, t], None if weights is None else weights[:, t])
    assert result.item() == pytest.approx(listwise_oracle(missing, weighted, t)[0], rel=1e-12)


@every_batch
def test_the_mask_says_which_rows_count_and_missing_labels_are_as_they_are(
    missing: float | None, weighted: bool
) -> None:
    given: list[Tensor] = []

    def seen(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        given.extend((labels.clone(), valid.clone()))
        return logits * 0.0

    logits, labels, weights = batch(missing, weighted=weighted)
    multi_task(seen, missing)(logits, labels, weights)
    assert torch.equal(given[0].nan_to_num(nan=-7.0), labels.nan_to_num(nan=-7.0))
    assert given[1].dtype == torch.bool
    expected = [[is_label(n, t, missing) and weight(n, t, weighted) != 0 for t in range(2)] for n in range(4)]
    assert given[1].tolist() == expected


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_the_mask_has_the_labels_shape_whatever_the_weights(shape: tuple[int, ...]) -> None:
    given: list[Tensor] = []

    def seen(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        given.append(valid.clone())
        return logits * 0.0

    logits, labels, _ = batch()
    multi_task(seen)(logits, labels, tensor([1.0, 0.0, -2.0, 0.5]).view(shape))
    assert given[0].tolist() == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]


def test_a_mask_of_class_labels() -> None:
    """The logits have a dimension more than the mask."""

    def smooth(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        assert valid.shape == labels.shape
        rows = labels.where(valid, 0).flatten()
        return F.cross_entropy(logits.flatten(0, 1), rows, reduction="none").view(labels.shape)

    logits = torch.randn(4, 2, 3, dtype=torch.float64)
    labels = torch.tensor([[0, -100], [1, 2], [-100, -100], [2, 1]])
    losses = multi_task(smooth, -100)(logits, labels)
    for t, task in enumerate(TASKS):
        exact = F.cross_entropy(logits[:, t], labels[:, t], ignore_index=-100)
        assert losses[f"loss/{task}"].item() == pytest.approx(exact.item(), rel=1e-12)


@pytest.mark.parametrize("missing", [-1.0, math.nan])
def test_a_listwise_loss_of_a_task_without_labels_is_0(missing: float) -> None:
    logits, labels, _ = batch()
    labels[:, 1] = missing
    losses = multi_task(listwise, missing)(logits, labels)
    (found,) = torch.autograd.grad(losses["loss"], logits)
    value, slopes = listwise_oracle(None, False, 0)
    assert losses["loss/b"].item() == 0.0
    assert losses["loss"].item() == pytest.approx(value, rel=1e-12)
    assert found[:, 0].tolist() == pytest.approx(slopes, rel=1e-12)
    assert (found[:, 1] == 0).all()


@pytest.mark.parametrize("function", [listwise, coupled, Scaled(), root])
@pytest.mark.parametrize("missing", [None, -1.0, math.nan])
def test_an_empty_batch_is_0(function: Any, missing: float | None) -> None:
    logits, labels, weights = batch()
    assert weights is not None
    for given in (None, weights[:0]):
        losses = multi_task(function, missing)(logits[:0], labels[:0], given)
        (found,) = torch.autograd.grad(losses["loss"], logits)
        assert losses["loss"].item() == 0.0
        assert (found == 0).all()
        one = None if given is None else given[:, 0]
        assert single(function, missing)(logits[:0, 0], labels[:0, 0], one).item() == 0.0


def with_keywords(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
    assert not others
    return logits - labels


def with_positional_only(logits: Tensor, labels: Tensor, valid: Tensor | None = None, /) -> Tensor:
    assert valid is None
    return logits - labels


@pytest.mark.parametrize("function", [with_keywords, with_positional_only, torch.sub])
def test_those_that_do_not_ask_for_it_get_no_mask(function: Any) -> None:
    logits, labels, weights = batch()
    losses = multi_task(function)(logits, labels, weights)
    terms = [math.fsum(w[t] * (x[t] - y[t]) for w, x, y in zip(WEIGHTS, LOGITS, LABELS)) / 4 for t in range(2)]
    assert [losses["loss/a"].item(), losses["loss/b"].item()] == pytest.approx(terms, rel=1e-12)


def test_a_parameter_does_not_see_a_masked_row_that_is_not_finite() -> None:
    """By the mask: the callable itself leaves it out."""
    scale = tensor(2.0).requires_grad_()

    def masked(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return 0.5 * ((logits.where(valid, 1.0).log() - labels.where(valid, 1.0).log()) / scale) ** 2

    logits, labels, weights = batch(math.nan)
    with torch.no_grad():
        logits[1, 0] = -1.0
        logits[0, 1] = math.nan
    result = multi_task(masked, math.nan)(logits, labels, weights)["loss"]
    by_scale, by_logit = torch.autograd.grad(result, (scale, logits))
    slope = sum(-2 * math.fsum(rows) / len(rows) for rows in scaled_terms(math.nan, True, 3)) / 2
    assert by_scale.item() == pytest.approx(slope, rel=1e-12)
    assert by_logit[1, 0].item() == by_logit[0, 1].item() == 0.0


def test_the_mask_reaches_a_callable_in_a_compiled_loss(new_compiler: None) -> None:
    loss = torch.compile(multi_task(listwise, -1), fullgraph=True, backend="eager")
    losses = loss(*batch(-1.0))
    for t, task in enumerate(TASKS):
        assert losses[f"loss/{task}"].item() == pytest.approx(listwise_oracle(-1.0, True, t)[0], rel=1e-12)


def all_rows(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Listwise, over rows that do not count too: the callable's own choice."""
    return coupled(logits, labels)


def coupled_slopes(weights: list[float], logits: list[float]) -> list[float]:
    """The derivative of -Σ w·log softmax(x) at the first row alone, whose label is 1, by each logit."""
    total = math.fsum(map(math.exp, logits))
    return [weights[0] * (math.exp(x) / total - (n == 0)) for n, x in enumerate(logits)]


def loss_of(loss: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    if isinstance(loss, Loss):
        result: Tensor = loss(logits, labels, weights)
        return result
    return loss(logits[:, None], labels[:, None], weights[:, None])["loss"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("learned", [False, True], ids=["weights", "learned weights"])
@pytest.mark.parametrize("small", [0.0, 1e-12, 1e-3])
@pytest.mark.parametrize("loss", [Loss(all_rows), MultiTaskLoss(all_rows, ["a"])], ids=["one", "several"])
def test_a_callable_that_takes_the_mask_has_the_gradient_of_the_loss_it_returns(
    loss: Any, small: float, learned: bool, compiled: bool, new_compiler: None
) -> None:
    """Rows of weight 0 included: it does not jump where a weight becomes 0."""
    rows = [1.0, 2.0, 0.0]
    logits = tensor(rows).requires_grad_()
    weights = tensor([1.0, small, small]).requires_grad_(learned)
    function = torch.compile(loss_of, fullgraph=True, backend="aot_eager") if compiled else loss_of
    result = function(loss, logits, tensor([1.0, 0.0, 0.0]), weights)
    (found,) = torch.autograd.grad(result, logits)
    expected = [slope / 3 for slope in coupled_slopes([1.0, small, small], rows)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_its_gradient_of_gradients_does_not_jump_either() -> None:
    """The derivative of softmax(x)[1] by x[1], at a row of weight 0."""
    rows = [1.0, 2.0, 0.0]
    logits, labels = tensor(rows).requires_grad_(), tensor([1.0, 0.0, 0.0])
    (slope,) = torch.autograd.grad(Loss(all_rows)(logits, labels, 3 * labels), logits, create_graph=True)
    share = math.exp(2.0) / math.fsum(map(math.exp, rows))
    assert torch.autograd.grad(slope[1], logits)[0][1].item() == pytest.approx(share * (1 - share), rel=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("learned", [False, True], ids=["weights", "learned weights"])
def test_of_its_gradient_only_what_is_not_finite_is_0_where_a_row_does_not_count(
    learned: bool, compiled: bool, new_compiler: None
) -> None:
    def steep(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return (logits - labels).abs().sqrt() + 0.0 * logits.sum(0)

    logits = tensor([[4.0], [3.0], [1.0]]).requires_grad_()
    labels, weights = tensor([[0.0], [3.0], [0.0]]), tensor([[1.0], [0.0], [1.0]]).requires_grad_(learned)
    loss = MultiTaskLoss(steep, ["a"])
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    (found,) = torch.autograd.grad(function(logits, labels, weights)["loss"], logits)
    assert found[:, 0].tolist() == pytest.approx([0.25 / 3, 0.0, 0.5 / 3], rel=1e-12)
