"""A loss with a quality that shifts its logits: it trains on the logits as they are, in the same pass."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support import quality_reference
from tests.support.pairwise import pairwise
from tests.support.quality_batches import TASKS, Rows, attached, columns, random_rows, recent, train_and_eval
from tests.support.rank_pool import RankPool, eager_alone
from tests.support.results import assert_close, numbers
from tests.support.shifted_quality import SHIFT, expected_of_shifted
from twloss import Loss, MultiTaskLoss, RankingQuality

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pos_weights": {"pos_weights": [2.0, 27.3, 0.5]},
    "weights": {"mean_over": "weights", "task_weights": [1.0, 2.0, 3.0]},
    "missing": {"ignore_index": -1, "pos_weights": 3.0},
    "max": {"global_reduction": "max", "global_batch": True},
}


def shifting(**options: Any) -> MultiTaskLoss:
    quality = RankingQuality(TASKS, ignore_index=options.get("ignore_index"), logit_shift=SHIFT)
    return attached(quality, **options)


def expect_shifted(loss: MultiTaskLoss, batches: list[Rows], tolerance: float = 1e-12, **options: Any) -> None:
    found = numbers(train_and_eval(loss)[0].compute())
    assert_close(found, expected_of_shifted(batches, missing=options.get("ignore_index")), tolerance)


def step(loss: Any, batch: Rows) -> tuple[dict[str, float], Tensor]:
    """The losses, and the gradient of the global one by the logits."""
    logits = batch.logits.clone().requires_grad_()
    losses = loss(logits, *batch[1:])
    losses["loss"].backward()
    assert logits.grad is not None
    return numbers(losses), logits.grad


@pytest.mark.usefixtures("eager_and_fused")
@pairwise(
    "eager_and_fused",
    options=OPTIONS,
    weighted={"": False, "weighted": True},
    rows={"37 rows": 37, "1,024 rows": 1024},
    eager_and_fused={"eager": False, "fused": True},
)
def test_the_quality_is_of_shifted_logits_and_the_loss_is_not(
    options: dict[str, Any], weighted: bool, rows: int
) -> None:
    """Also of rows that are seen several abreast, with and without some that fill up the last ones."""
    batch = random_rows(rows, rows, weighted=weighted, missing=options.get("ignore_index"))
    loss, plain = shifting(**options), attached(quality=False, **options)
    (found, gradient), (expected, exact) = step(loss, batch), step(plain, batch)
    assert repr(found) == repr(expected)
    assert torch.equal(gradient, exact)
    loss.eval()(*batch)
    for metric in train_and_eval(loss):
        oracle = expected_of_shifted([batch], missing=options.get("ignore_index"))
        assert_close(numbers(metric.compute()), oracle)


@pytest.mark.usefixtures("eager_and_fused")
def test_one_task() -> None:
    loss = Loss("bce_with_logits", quality=RankingQuality(None, logit_shift=-1.5))
    batch = random_rows(12, tasks=1)
    loss(batch.logits.view(3, 4), batch.labels.view(3, 4))
    rows = [(x - 1.5, y, w) for x, y, w in columns([batch], ["x"])["x"]]
    assert_close(numbers(train_and_eval(loss)[0].compute()), quality_reference.quality(rows))


@pytest.mark.usefixtures("eager_and_fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_infinite_logits(dtype: torch.dtype) -> None:
    batch = random_rows(70, weighted=True, dtype=dtype)
    logits, labels = batch.logits.clone(), batch.labels.clone()
    logits[:4] = torch.tensor([[math.inf], [-math.inf], [6e4], [-6e4]])
    labels[:4] = (logits[:4] > 0).to(dtype)
    loss = shifting()
    loss(logits, labels, batch.weights)
    expect_shifted(loss, [Rows(logits, labels, batch.weights)], 1e-6)


@pytest.mark.usefixtures("eager_and_fused")
@pytest.mark.parametrize("differentiable", ["labels", "weights"])
def test_where_autograd_differentiates_the_rows(differentiable: str) -> None:
    batch, loss = random_rows(20, weighted=True), shifting(pos_weights=2.0)
    getattr(batch, differentiable).requires_grad_()
    loss(*batch)["loss"].backward()
    expect_shifted(loss, [batch])
    assert not train_and_eval(loss)[0].totals.requires_grad


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square()


@pytest.mark.usefixtures("eager_and_fused")
def test_of_tasks_of_several_types_the_binary_ones_are_shifted() -> None:
    types: dict[str, Any] = {"price": squared, "like": "bce_with_logits", "stars": squared, "reply": "bce_with_logits"}
    quality = RankingQuality(["like", "reply"], logit_shift={"like": SHIFT[0], "reply": SHIFT[1]})
    loss, plain = (MultiTaskLoss(types, list(types), quality=each) for each in (quality, False))
    batch = random_rows(40, tasks=4, weighted=True)
    assert repr(numbers(loss(*batch))) == repr(numbers(plain(*batch)))
    assert batch.weights is not None
    binary = Rows(batch.logits[:, 1::2], batch.labels[:, 1::2], batch.weights[:, 1::2])
    found = numbers(train_and_eval(loss)[0].compute())
    assert_close(found, expected_of_shifted([binary], SHIFT[:2], ["like", "reply"]))


@pytest.mark.usefixtures("eager_and_fused")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_and_a_cast_and_a_model_made_empty_keep_it(duplicate: Any) -> None:
    with torch.device("meta"):
        loss = shifting()
    twin = duplicate(loss.to_empty(device="cpu").bfloat16())
    batch = random_rows(9)
    twin(*batch)
    assert train_and_eval(twin)[1].logit_shift == SHIFT
    expect_shifted(twin, [batch])


def test_it_is_no_buffer_parameter_or_entry_of_the_state_dict() -> None:
    loss = shifting()
    loss(*random_rows(5))
    assert [*loss.buffers(), *loss.parameters(), *loss.state_dict()] == []


@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("options", [{}, {"pos_weights": 3.0, "mean_over": "weights"}], ids=str)
def test_one_graph_of_a_compiled_loss_and_no_recompilation(options: dict[str, Any]) -> None:
    loss, counter = shifting(**options), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    batches = [random_rows(64, seed, weighted=True) for seed in range(4)]
    for batch in batches:
        step(compiled, batch)
    assert counter.frame_count == 1
    expect_shifted(loss, batches, 1e-11)


@pytest.mark.usefixtures("new_compiler", "inductor")
@pytest.mark.parametrize("fused", [False, True], ids=["the loss in a compiled model", "fused"])
def test_generated_code(fused: bool) -> None:
    loss = shifting(fused=fused, pos_weights=2.0)
    run = loss if fused else torch.compile(loss, fullgraph=True)
    batches = [random_rows(rows, rows, weighted=True, dtype=torch.float32) for rows in (64, 37)]
    for batch in batches:
        step(run, batch)
    expect_shifted(loss, batches, 1e-6)


def train_on_ranks(rank: int, batches: list[list[Rows]], fused: bool) -> dict[str, float]:
    quality = RankingQuality(TASKS, logit_shift=SHIFT, window=2)
    loss = attached(quality, global_batch=True, fused=fused)
    for batch in batches[rank]:
        step(loss, batch)
    return numbers(train_and_eval(loss)[0].compute())


@eager_alone
@pytest.mark.usefixtures("eager_and_fused")
@pytest.mark.parametrize("fused", [False, True])
def test_over_ranks(two_ranks: RankPool, fused: bool) -> None:
    batches = [[random_rows(34 + 6 * rank, 10 * rank + each) for each in range(3)] for rank in range(2)]
    for found in two_ranks.run(train_on_ranks, batches, fused):
        assert_close(recent(found, window=False), expected_of_shifted([*batches[0], *batches[1]]))
        assert_close(recent(found, window=True), expected_of_shifted([*batches[0][1:], *batches[1][1:]]))


def test_a_quality_of_another_shift_takes_no_sums_of_a_checkpoint() -> None:
    saved, loaded = shifting(), attached(RankingQuality(TASKS))
    for loss in (saved, loaded):
        train_and_eval(loss)[0].persistent(True)
    saved(*random_rows(9))
    with pytest.raises(RuntimeError, match="logit_shift"):
        loaded.load_state_dict(saved.state_dict())
    assert not train_and_eval(loaded)[0].update_called
