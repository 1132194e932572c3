"""Generated code: the passes of ``fused=True`` and whole models, by the back end that torch.compile has by default.

Elsewhere the tests compile with "aot_eager", see ``tests/support/compiler.py``. Here code is generated for each option
of a pass, each dtype and each number of ranks, for numbers of rows that are divisible by 16 or not, and for extreme
values.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.counts import peak_bytes
from tests.laws import test_laws as laws
from tests.losses import test_fused as fused
from tests.losses import test_one_number as one_number
from tests.support import reference
from tests.support.cases import Settings
from tests.support.compiler import by_inductor
from tests.support.definition import columns_of_batch, expect_the_definition
from tests.support.gpu import needs_a_gpu
from tests.support.metrics import weights_of
from tests.support.patience import SECONDS
from tests.support.quality_batches import Rows, expected, recent
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, numbers
from twloss import MultiTaskLoss, RankingQuality

pytestmark = pytest.mark.usefixtures("new_compiler", "inductor")

TASKS = ["a", "b", "c"]
PLAIN, POSITIVE = Settings(fused=True), Settings(pos_weights=[0.5, 27.3, 4.0], fused=True)
ALL = Settings(4, "sum", "mean", [0.5, 27.3, 4.0, 1.0], [1.0, 0.0, 2.5, 3.0], "weights", -1.0, fused=True)
NAMES = PLAIN.names()

# The settings, the rows, the dtype, and what else differs.
PASSES: dict[str, tuple[Settings, int, torch.dtype, dict[str, Any]]] = {
    "plain": (PLAIN, 48, torch.float32, {}),
    "all settings": (ALL, 32, torch.float64, {"weighted": True}),
    "evaluation": (POSITIVE, 48, torch.float32, {"training": False}),
    "quality, odd rows": (POSITIVE, 37, torch.float32, {"quality": True, "weighted": True}),
}
MORE_PASSES: dict[str, tuple[Settings, int, torch.dtype, dict[str, Any]]] = {
    "pos_weights, weights": (POSITIVE, 37, torch.float32, {"weighted": True}),
    "bfloat16": (PLAIN, 33, torch.bfloat16, {}),
    "bfloat16, all settings": (ALL, 32, torch.bfloat16, {"weighted": True}),
    "float64, odd rows": (POSITIVE, 37, torch.float64, {}),
    "missing is NaN": (Settings(ignore_index=float("nan"), fused=True), 32, torch.float32, {}),
    "a callable reduction": (Settings(global_reduction="norm", fused=True), 32, torch.float32, {"global_batch": True}),
    "a maximum": (Settings(global_reduction="max", fused=True), 31, torch.float32, {}),
    "evaluation of the quality": (PLAIN, 37, torch.float32, {"training": False, "quality": True}),
    "quality of a plain loss": (
        PLAIN,
        31,
        torch.float64,
        {"quality": RankingQuality(NAMES, window=2), "weighted": True},
    ),
    "quality of the last rows": (PLAIN, 32, torch.float32, {"quality": RankingQuality(NAMES, window_rows=10)}),
    "sums that drop nothing": (PLAIN, 32, torch.float32, {"quality": RankingQuality(NAMES, nan_strategy="disable")}),
}


@pytest.mark.parametrize(("case", "rows", "dtype", "options"), PASSES.values(), ids=PASSES)
def test_a_pass_gives_what_the_definition_says(case: Settings, rows: int, dtype: torch.dtype, options: Any) -> None:
    expect_the_definition(case, rows, dtype, **options)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("case", "rows", "dtype", "options"), MORE_PASSES.values(), ids=MORE_PASSES)
def test_every_other_pass_does_too(case: Settings, rows: int, dtype: torch.dtype, options: Any) -> None:
    expect_the_definition(case, rows, dtype, **options)


def expect_one_number(pos_weight: float | None, dtype: torch.dtype) -> None:
    one_number.test_the_loss_of_a_row_is_that_of_the_definition(one_number.fused, pos_weight, dtype)
    one_number.test_the_derivative_by_a_logit_is_that_of_the_definition(one_number.fused, pos_weight, dtype)
    one_number.test_nan_stays_nan(one_number.fused, pos_weight, dtype)


def test_extreme_logits_and_nan_give_the_one_number() -> None:
    expect_one_number(None, torch.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("pos_weight", "dtype"), [(3.0, torch.float32), (None, torch.float64), (3.0, torch.float64)])
def test_extreme_logits_and_nan_give_the_one_number_everywhere(pos_weight: float | None, dtype: torch.dtype) -> None:
    expect_one_number(pos_weight, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("label_dtype", [torch.bool, torch.int64])
def test_rows_of_weight_0_may_be_nan_and_labels_of_another_dtype(label_dtype: torch.dtype) -> None:
    logits, labels = torch.randn(33, 3), torch.randint(0, 2, (33, 3)).to(label_dtype)
    weights = torch.rand(33, 3) * (torch.rand(33, 3) < 0.7)
    logits[weights == 0] = float("nan")
    logits.requires_grad_()
    result = PLAIN.loss()(logits, labels, weights)
    columns = columns_of_batch(PLAIN, Rows(logits.detach(), labels, weights))
    assert numbers(result) == pytest.approx(reference.losses(columns, PLAIN.rule()), rel=1e-6)
    (gradient,) = torch.autograd.grad(result["loss"], logits)
    assert (gradient[weights == 0] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.exhaustive
def test_binary_tasks_among_others_and_one_task_of_any_shape() -> None:
    fused.test_of_mixed_types_the_binary_tasks_are_fused()
    fused.test_one_task_of_any_shape()


LAWS = Settings(3, "mean", "sum", [0.5, 27.3, 4.0], fused=True)


@pytest.mark.exhaustive
def test_both_laws_on_two_ranks(two_ranks: RankPool) -> None:
    laws.expect_both_laws(LAWS, [[16, 5], [32, 1], [8, 0]], partial(two_ranks.run, by_inductor, laws.run))


@pytest.mark.exhaustive
def test_both_laws_on_three_ranks(three_ranks: RankPool) -> None:
    laws.expect_both_laws(LAWS, [[16, 5, 0], [0, 32, 1]], partial(three_ranks.run, by_inductor, laws.run))


# Whole models.


class Model(nn.Module):
    """Heads with a loss, whose quality is over the last two updates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(4, 3, dtype=torch.float64)
        self.loss = MultiTaskLoss(
            "bce_with_logits", TASKS, pos_weights=[1.5, 2.0, 1.0], quality=RankingQuality(TASKS, window=2)
        )

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The global loss."""
        loss: Tensor = self.loss(self.heads(features), labels, weights)["loss"]
        return loss


def model_batch() -> tuple[Tensor, Tensor, Tensor]:
    features, labels, weights = (torch.rand(8, width, dtype=torch.float64) for width in (4, 3, 3))
    return features, labels.round(), weights


def test_a_compiled_model_gives_the_losses_of_eager_and_the_quality_of_the_oracle() -> None:
    model, twin = Model(), Model()
    compiled, rows = torch.compile(model, fullgraph=True), []
    for _ in range(3):
        inputs = model_batch()
        compiled(*inputs).backward()
        twin(*inputs).backward()
        rows.append(Rows(twin.heads(inputs[0]).detach(), *inputs[1:]))
    quality = numbers(model.loss.train_quality.compute())
    assert_close(recent(quality, window=False), expected(rows, TASKS), 1e-11)
    assert_close(recent(quality, window=True), expected(rows[-2:], TASKS), 1e-11)
    torch.testing.assert_close(model.loss.train_metric.compute(), twin.loss.train_metric.compute(), rtol=1e-12, atol=0)
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_a_gpu)])
@pytest.mark.parametrize("rows", [64, 37])
def test_gradients_of_a_compiled_loss_by_any_of_its_losses(device: str, rows: int) -> None:
    """Of rows that are seen sixteen abreast, where each task's factors are repeated, and of rows that are not."""
    pos_weights, task_weights = torch.tensor([0.5, 27.3, 4.0]), torch.tensor([1.0, 3.0, 0.5])
    loss = MultiTaskLoss(
        "bce_with_logits", TASKS, pos_weights=pos_weights.tolist(), task_weights=task_weights.tolist()
    ).to(device)
    compiled: Any = torch.compile(loss, fullgraph=True)
    logits, labels, weights = torch.randn(rows, 3), torch.rand(rows, 3), torch.rand(rows, 3)
    exact = logits.double().requires_grad_()
    of_rows = F.binary_cross_entropy_with_logits(
        exact, labels.double(), weights.double(), pos_weight=pos_weights.double(), reduction="none"
    )
    of_tasks = of_rows.mean(0)
    for of_global, of_a, of_c in ((1.0, 0.0, 0.0), (0.0, 2.0, -1.0), (1.0, 0.5, 3.0)):
        own = logits.to(device).clone().requires_grad_()
        losses = compiled(own, labels.to(device), weights.to(device))
        (of_global * losses["loss"] + of_a * losses["loss/a"] + of_c * losses["loss/c"]).backward()
        expected = of_global * (of_tasks * task_weights).mean() + of_a * of_tasks[0] + of_c * of_tasks[2]
        (gradient,) = torch.autograd.grad(expected, exact, retain_graph=True)
        assert own.grad is not None
        torch.testing.assert_close(own.grad.cpu().double(), gradient, rtol=2e-6, atol=1e-9)


@pytest.mark.exhaustive
def test_reduce_overhead_is_traced() -> None:
    model = Model()
    torch.compile(model, fullgraph=True, mode="reduce-overhead")(*model_batch()).backward()
    assert weights_of(model.loss.train_metric) == pytest.approx([8.0] * 3)


# What only the generator has a part in.


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_holds_the_slopes_and_one_more_tensor_of_the_batchs_size_for_the_pass(weighted: bool) -> None:
    loss = (POSITIVE if weighted else PLAIN).loss()
    logits = torch.randn(4096, 3, requires_grad=True)
    inputs = [torch.rand(4096, 3) for _ in range(1 + weighted)]

    def run() -> None:
        loss(logits, *inputs)["loss"].backward()
        logits.grad = None

    size = logits.numel() * logits.element_size()
    assert size < peak_bytes(run, torch.device("cpu")) < 2.1 * size


def test_to_compile_it_warns_of_nothing() -> None:
    logits, labels = torch.randn(16, 3, requires_grad=True), torch.rand(16, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*torch.jit.script_method", DeprecationWarning)
        PLAIN.loss()(2 * logits, labels)["loss"].backward()


NO_COMPILER = """
import torch
from twloss import MultiTaskLoss

loss = MultiTaskLoss("bce_with_logits", ["like"], fused=True)
for _ in range(2):
    try:
        loss(torch.zeros(64, 1, requires_grad=True), torch.ones(64, 1))
    except RuntimeError as error:
        print(error)
print(loss.train_metric.update_count)
"""


@pytest.mark.exhaustive
def test_without_a_compiler_one_error_names_what_is_missing_and_the_way_out(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", NO_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    *errors, count = done.stdout.splitlines()
    assert len(errors) == 2
    assert all("fused=False" in error and "C++ compiler" in error and "g++" in error for error in errors)
    assert count == "0"
