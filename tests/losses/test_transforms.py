"""What a transform of torch runs gives the right values, and counts as no batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.support import reference
from twloss import Loss

X, Y, W = [0.4, -1.5, 0.0, 3.0], [1.0, 0.0, 0.3, 1.0], [1.0, 2.0, 0.25, 0.5]
DIRECTION = [1.0, -2.0, 0.5, 3.0]
VALUE = math.fsum(w * reference.bce_with_logits(x, y) for x, y, w in zip(X, Y, W)) / 4
SLOPES = [w * reference.bce_slope(x, y) / 4 for x, y, w in zip(X, Y, W)]
DERIVATIVE = math.fsum(slope * each for slope, each in zip(SLOPES, DIRECTION))

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch's own forward mode


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=["rows", "sums", "sums and a number"])
def loss(request: pytest.FixtureRequest) -> Loss:
    """The loss of rows, or of sums that are made of them."""
    if request.param == "rows":
        return Loss("bce_with_logits", quality=True)
    return OfSums(request.param)


class OfSums(Loss):
    """Takes rows, and hands over their sums."""

    def __init__(self, form: str) -> None:
        super().__init__("given")
        self.form = form

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """The loss of the sums of these rows."""
        rows = weights * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        count = rows.numel() if "number" in self.form else torch.ones_like(labels).sum()
        return self.from_sums(rows.sum(), count)

    __call__ = nn.Module.__call__


def counts(loss: Loss) -> tuple[int, int]:
    """The updates of the loss's metric and of its quality, where it has one."""
    metric = loss.train_metric
    return metric.update_count, (loss.train_quality if loss.quality else metric).update_count


def at(loss: Loss, logits: Tensor) -> Tensor:
    return loss(logits, tensor(Y), tensor(W))


def close(found: Tensor, expected: float | list[float]) -> bool:
    return bool(found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15))


def test_a_plain_call_counts_once(loss: Loss) -> None:
    assert close(at(loss, tensor(X)), VALUE)
    assert counts(loss) == (1, 1)


def test_forward_mode_counts_nothing(loss: Loss) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(at(loss, forward_ad.make_dual(tensor(X), tensor(DIRECTION))))
        assert close(dual.primal, VALUE)
        assert dual.tangent is not None
        assert close(dual.tangent, DERIVATIVE)
    assert counts(loss) == (0, 0)


@pytest.mark.parametrize("of", ["labels", "weights"])
def test_forward_mode_by_another_input_counts_nothing(loss: Loss, of: str) -> None:
    inputs: dict[str, Any] = {"labels": tensor(Y), "weights": tensor(W)}
    with forward_ad.dual_level():
        inputs[of] = forward_ad.make_dual(inputs[of], tensor(DIRECTION))
        dual = forward_ad.unpack_dual(loss(tensor(X), **inputs))
        by_label = [-w * x / 4 for x, w in zip(X, W)]
        by_weight = [reference.bce_with_logits(x, y) / 4 for x, y in zip(X, Y)]
        slopes = by_label if of == "labels" else by_weight
        assert close(dual.primal, VALUE)
        assert dual.tangent is not None
        assert close(dual.tangent, math.fsum(slope * each for slope, each in zip(slopes, DIRECTION)))
    assert counts(loss) == (0, 0)


def test_a_plain_call_within_a_dual_level_counts_once(loss: Loss) -> None:
    with forward_ad.dual_level():
        at(loss, tensor(X))
    assert counts(loss) == (1, 1)


def test_vmap_counts_nothing(loss: Loss) -> None:
    """Over the logits, with the labels of one batch; and over all inputs."""
    stacked = torch.stack((tensor(X), -tensor(X)))
    flipped = math.fsum(w * reference.bce_with_logits(-x, y) for x, y, w in zip(X, Y, W)) / 4
    assert close(torch.func.vmap(lambda logits: at(loss, logits))(stacked), [VALUE, flipped])
    others = (tensor(Y).expand(2, 4), tensor(W).expand(2, 4))
    assert close(torch.func.vmap(loss)(stacked, *others), [VALUE, flipped])
    assert counts(loss) == (0, 0)


def test_jvp_counts_nothing(loss: Loss) -> None:
    found, tangent = torch.func.jvp(lambda logits: at(loss, logits), (tensor(X),), (tensor(DIRECTION),))[:2]
    assert close(found, VALUE)
    assert close(tangent, DERIVATIVE)
    assert counts(loss) == (0, 0)


def test_grad_counts_nothing(loss: Loss) -> None:
    assert close(torch.func.grad(lambda logits: at(loss, logits))(tensor(X)), SLOPES)
    assert counts(loss) == (0, 0)


def test_jacrev_counts_nothing(loss: Loss) -> None:
    def twice(logits: Tensor) -> Tensor:
        found = at(loss, logits)
        return torch.stack((found, -2 * found))

    assert close(torch.func.jacrev(twice)(tensor(X)).flatten(), [*SLOPES, *(-2 * slope for slope in SLOPES)])
    assert counts(loss) == (0, 0)


def test_gradients_of_each_row_count_nothing(loss: Loss) -> None:
    """One row is one loss: vmap over grad."""
    grads = torch.func.vmap(torch.func.grad(loss))(tensor(X), tensor(Y), tensor(W))
    assert close(grads, [4 * slope for slope in SLOPES])
    assert counts(loss) == (0, 0)


def test_hessian_counts_nothing(loss: Loss) -> None:
    found = torch.func.hessian(lambda logits: at(loss, logits))(tensor(X))
    diagonal = [w * reference.sigmoid(x) * reference.sigmoid(-x) / 4 for x, w in zip(X, W)]
    assert close(found.diagonal(), diagonal)
    assert close(found.sum(), math.fsum(diagonal))
    assert counts(loss) == (0, 0)


@pytest.mark.filterwarnings("ignore")  # by torch's own tracing
def test_linearize_counts_its_one_plain_call(loss: Loss) -> None:
    found, linear = torch.func.linearize(lambda logits: at(loss, logits), tensor(X))
    for _ in range(3):
        assert close(linear(tensor(DIRECTION)), DERIVATIVE)
    assert close(found, VALUE)
    assert counts(loss) == (1, 1)
