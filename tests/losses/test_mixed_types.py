"""A loss type for each task, and rows of its own: what is computed, in how many kernels, and wherever a loss may go."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from benchmarks.counts import KernelLog
from tests.support import quality_reference, reference
from tests.support.mixed import Scaled, squared
from tests.support.results import assert_close
from twloss import Loss, LossType, MultiTaskLoss, RankingQuality

NAMES = ["click", "time", "like"]
TYPES: dict[str, Any] = {"click": "bce_with_logits", "time": squared, "like": LossType.BCE_WITH_LOGITS}


def bce(logits: Tensor, labels: Tensor, pos_weight: float = 1.0) -> float:
    """The mean binary cross-entropy, row by row."""
    pairs = zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True)
    rows = [reference.bce_with_logits(x, y, pos_weight) for x, y in pairs]
    return math.fsum(rows) / len(rows)


def mse(logits: Tensor, labels: Tensor) -> float:
    """The mean squared error, row by row."""
    rows = [(x - y) ** 2 for x, y in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True)]
    return math.fsum(rows) / len(rows)


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in losses.items()}


def random_inputs(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, dtype=torch.float64), torch.rand(rows, 3, dtype=torch.float64)


def ragged_inputs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    logits = {"click": torch.randn(4, 1), "time": torch.randn(2), "like": torch.randn(0)}
    labels = {"click": torch.tensor([0, 1, 1, 0]), "time": torch.randn(2), "like": torch.zeros(0)}
    return {task: each.double().requires_grad_() for task, each in logits.items()}, labels


@pytest.mark.parametrize("form", ["tensors", "mappings", "logits by task, labels in one", "labels by task"])
def test_the_form_of_the_inputs_does_not_matter_and_the_order_is_that_of_the_tasks(form: str) -> None:
    logits, labels = random_inputs()
    expected = [bce(logits[:, 0], labels[:, 0]), mse(logits[:, 1], labels[:, 1]), bce(logits[:, 2], labels[:, 2])]
    given: list[Any] = [logits, labels]
    by_task = [{task: each[:, t] for t, task in enumerate(NAMES)} for each in given]
    if form == "mappings":
        given = by_task
    elif form == "logits by task, labels in one":
        given = [by_task[0], labels]
    elif form == "labels by task":
        given = [logits, by_task[1]]
    loss = MultiTaskLoss(TYPES, NAMES)
    losses = loss(*given)
    assert list(losses) == ["loss/click", "loss/time", "loss/like", "loss"]
    assert list(numbers(losses).values()) == pytest.approx([*expected, math.fsum(expected) / 3], rel=1e-14)
    assert numbers(loss.train_metric.compute()) == pytest.approx(numbers(losses), rel=1e-14)
    assert list(loss.train_metric.compute()) == list(losses)


@pytest.mark.parametrize("shape", [(6, 3), (6, 1), (6,)])
def test_weights_in_one_tensor_serve_all_types(shape: tuple[int, ...]) -> None:
    logits, labels = random_inputs()
    weights = torch.rand(*shape, dtype=torch.float64)
    columns = weights.view(6, -1).expand(6, 3)
    losses = MultiTaskLoss(TYPES, NAMES)(logits, labels, weights)
    expected = math.fsum(
        w * (x - y) ** 2 for w, x, y in zip(columns[:, 1].tolist(), logits[:, 1].tolist(), labels[:, 1].tolist())
    )
    assert losses["loss/time"].item() == pytest.approx(expected / 6, rel=1e-14)


def test_rows_of_its_own_leave_a_task_as_if_it_were_alone() -> None:
    logits, labels = ragged_inputs()
    losses = MultiTaskLoss(TYPES, NAMES)(logits, labels)
    click, time = bce(logits["click"], labels["click"]), mse(logits["time"], labels["time"])
    assert numbers(losses) == pytest.approx(
        {"loss/click": click, "loss/time": time, "loss/like": 0.0, "loss": (click + time) / 2}, rel=1e-14
    )
    losses["loss"].backward()
    slopes = [(reference.sigmoid(x) - y) / 8 for x, y in zip(logits["click"].flatten().tolist(), [0, 1, 1, 0])]
    assert logits["click"].grad is not None
    assert logits["click"].grad.flatten().tolist() == pytest.approx(slopes, rel=1e-14)
    assert logits["like"].grad is not None  # of 0 rows, but connected
    assert logits["like"].grad.shape == (0,)


def test_rows_of_its_own_with_one_type_too() -> None:
    names = ["a", "b", "c"]
    logits = {task: torch.randn(rows, dtype=torch.float64) for task, rows in zip(names, (5, 0, 2))}
    labels = {task: torch.rand(len(each)).double() for task, each in logits.items()}
    weights = {task: torch.rand(len(each)).double() for task, each in logits.items()}
    loss = MultiTaskLoss("bce_with_logits", names, mean_over="weights")
    for task in ("a", "c"):
        rows = zip(logits[task].tolist(), labels[task].tolist(), weights[task].tolist(), strict=True)
        loss_sum = math.fsum(w * reference.bce_with_logits(x, y) for x, y, w in rows)
        found = loss(logits, labels, weights)[f"loss/{task}"].item()
        assert found == pytest.approx(loss_sum / math.fsum(weights[task].tolist()), rel=1e-14)


def test_what_is_not_finite_stays_in_its_task_and_its_row() -> None:
    logits = {"a": torch.tensor([math.nan, 1.0]), "b": torch.tensor([0.5, math.inf, 2.0, -1.0])}
    labels = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0, math.nan, 0.0, 1.0])}
    weights = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    inputs = {task: each.requires_grad_() for task, each in logits.items()}
    for loss_type in (
        "bce_with_logits",
        {"a": squared, "b": "bce_with_logits"},
        {"a": "bce_with_logits", "b": squared},
    ):
        losses = MultiTaskLoss(loss_type, ["a", "b"])(inputs, labels, weights)  # type: ignore[arg-type]
        assert all(value.isfinite() for value in losses.values())
        for gradient, weight in zip(torch.autograd.grad(losses["loss"], list(inputs.values())), weights.values()):
            assert gradient.isfinite().all()
            assert (gradient[weight == 0] == 0).all()


def test_a_callable_sees_real_rows_where_a_task_has_fewer() -> None:
    """A logarithm of a padded 0 would be infinite, and its derivative by a parameter not a number."""
    seen: list[Tensor] = []

    def logarithmic(logits: Tensor, labels: Tensor) -> Tensor:
        seen.extend((logits, labels))
        return (logits.log() - labels.log()).square()

    logits = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0]), "c": torch.zeros(0)}
    labels = {task: each + 1 for task, each in logits.items()}
    losses = MultiTaskLoss(logarithmic, ["a", "b", "c"])(logits, labels)
    assert [each.shape for each in seen] == [(3, 3), (3, 3)]
    assert all((each > 0).all() for each in seen)
    assert losses["loss/b"].item() == pytest.approx((math.log(4) - math.log(5)) ** 2, rel=1e-6)


def test_a_task_with_fewer_rows_is_padded_by_its_own_first_row() -> None:
    """A row of another task may be one that its loss is not finite at."""
    seen: list[list[list[float]]] = []

    def record(logits: Tensor, labels: Tensor) -> Tensor:
        seen.extend((logits.T.tolist(), labels.T.tolist()))
        return squared(logits, labels)

    logits = {"a": torch.tensor([1.0]), "b": torch.tensor([5.0, 6.0, 7.0]), "c": torch.tensor([2.0, 3.0])}
    labels = {task: 10 * each for task, each in logits.items()}
    losses = MultiTaskLoss(record, list(logits))(logits, labels)
    assert seen[0] == [[1.0, 1.0, 1.0], [5.0, 6.0, 7.0], [2.0, 3.0, 2.0]]
    assert seen[1] == [[10.0, 10.0, 10.0], [50.0, 60.0, 70.0], [20.0, 30.0, 20.0]]
    assert losses["loss/a"].item() == 81.0


def test_a_callable_is_told_which_rows_a_task_has() -> None:
    seen = []

    def listwise(logits: Tensor, labels: Tensor, *, valid: Tensor) -> Tensor:
        seen.append(valid.tolist())
        return -labels * logits.masked_fill(~valid, -math.inf).log_softmax(0).where(valid, 0.0)

    logits = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([0.0, 1.0])}
    labels = {"a": torch.tensor([0.0, 1.0, 0.0]), "b": torch.tensor([1.0, 0.0])}
    losses = MultiTaskLoss({"a": listwise, "b": listwise}, ["a", "b"], "sum", global_batch=True)(logits, labels)
    assert seen == [[[True, True], [True, True], [True, False]]]
    assert losses["loss/b"].item() == pytest.approx(math.log(1 + math.e), rel=1e-6)
    assert losses["loss/a"].item() == pytest.approx(math.log(1 + math.exp(-1) + math.e), rel=1e-6)


def kernels(loss_type: Any, tasks: int, form: str) -> int:
    """The kernels of forward, backward and tracking."""
    names = [f"task{t}" for t in range(tasks)]
    types = {name: loss_type[t % len(loss_type)] for t, name in enumerate(names)}
    loss = MultiTaskLoss(types, names)
    if form == "tensors":
        logits: Any = torch.randn(12, tasks, requires_grad=True)
        labels: Any = torch.rand(12, tasks)
    else:
        rows = [12 - (form == "ragged") * (t % 3) for t in range(tasks)]
        logits = {name: torch.randn(n, requires_grad=True) for name, n in zip(names, rows)}
        labels = {name: torch.rand(n) for name, n in zip(names, rows)}
    with KernelLog() as count:
        loss(logits, labels)["loss"].backward()
    return len(count.names)


@pytest.mark.parametrize("form", ["tensors", "mappings", "ragged"])
@pytest.mark.parametrize("regression", [squared, nn.MSELoss(reduction="none"), nn.HuberLoss(reduction="none")])
def test_kernels_grow_with_the_types_and_not_with_the_tasks(form: str, regression: Any) -> None:
    """Those of torch's own losses give a gradient in a layout of its own, of which each head would make a copy."""
    one, two = (LossType.BCE_WITH_LOGITS,), (LossType.BCE_WITH_LOGITS, regression)
    assert kernels(two, 10, form) == kernels(two, 100, form)
    assert kernels((regression,), 10, form) == kernels((regression,), 100, form)
    assert kernels(two, 100, form) <= 2.2 * kernels(one, 100, form)


def test_tasks_that_share_a_callable_are_one_call() -> None:
    class Loss2:
        def __init__(self) -> None:
            self.calls = 0

        def rows(self, logits: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            return squared(logits, labels)

    bound, shared, shapes = Loss2(), Scaled(), []
    shared.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    names = ["a", "b", "c", "d"]
    types: dict[str, Any] = {"a": bound.rows, "b": shared, "c": bound.rows, "d": shared}
    loss = MultiTaskLoss(types, names)
    loss(torch.zeros(5, 4), torch.zeros(5, 4))
    assert bound.calls == 1
    assert shapes == [(5, 2)]
    assert [name for name, _ in loss.named_parameters()] == ["loss_type_1.scale"]


def test_a_module_is_trained_with_the_loss_whatever_its_task_is_called() -> None:
    names = ["a.b", "keys", "train_metric", "loss_type"]
    modules = [Scaled() for _ in names]
    loss = MultiTaskLoss(dict(zip(names, modules)), names)
    assert list(loss.state_dict()) == [f"loss_type_{t}.scale" for t in range(4)]
    loss(torch.ones(2, 4), torch.zeros(2, 4))["loss"].backward()
    for module in modules:  # d/ds (1/s² + 2 log s) / 4 at s = 2
        assert module.scale.grad is not None
        assert module.scale.grad.item() == pytest.approx((-2 / 8 + 1) / 4, rel=1e-6)
    other = MultiTaskLoss({name: Scaled() for name in names}, names)
    modules[2].scale.data.fill_(5.0)
    other.load_state_dict(loss.state_dict())
    assert other.loss_type["train_metric"].scale.item() == 5.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_and_casts_have_modules_and_numbers_of_their_own(copied: Any) -> None:
    types: dict[str, Any] = {"a": "bce_with_logits", "b": Scaled(), "c": "bce_with_logits"}
    loss = MultiTaskLoss(types, ["a", "b", "c"], pos_weights={"c": 3.0}, ignore_index={"a": -1.0})
    twin = copied(loss).bfloat16().float()
    inputs = torch.randn(4, 3, dtype=torch.float64), torch.tensor([[-1.0, 0.5, 1.0]] * 4)
    assert numbers(twin(*inputs)) == pytest.approx(numbers(loss(*inputs)), rel=1e-7)
    assert twin.loss_type["b"] is next(twin.children())
    assert twin.loss_type["b"] is not loss.loss_type["b"]
    assert loss.train_metric.update_count == twin.train_metric.update_count == 1


def test_a_loss_made_on_the_meta_device_serves_inputs_anywhere() -> None:
    with torch.device("meta"):
        loss = MultiTaskLoss(TYPES, NAMES, pos_weights={"like": 3.0})
    logits, labels = random_inputs()
    losses = loss.to_empty(device="cpu")(logits, labels)
    assert losses["loss/like"].item() == pytest.approx(bce(logits[:, 2], labels[:, 2], 3.0), rel=1e-14)


def test_float64_in_one_task_makes_all_losses_float64() -> None:
    logits = {"click": torch.zeros(2), "time": torch.zeros(2, dtype=torch.float64), "like": torch.zeros(2).half()}
    losses = MultiTaskLoss(TYPES, NAMES)(logits, {task: torch.ones(2) for task in NAMES})
    assert {value.dtype for value in losses.values()} == {torch.float64}


def test_pos_weights_by_name_or_for_all_that_are_binary() -> None:
    logits, labels = random_inputs()
    for given, click, like in (({"like": 3.0}, 1.0, 3.0), (2.0, 2.0, 2.0), ([4.0, 1.0, 5.0], 4.0, 5.0), ({}, 1.0, 1.0)):
        loss = MultiTaskLoss(TYPES, NAMES, pos_weights=given)
        losses = loss(logits, labels)
        assert loss.pos_weights == (click, 1.0, like)
        assert losses["loss/click"].item() == pytest.approx(bce(logits[:, 0], labels[:, 0], click), rel=1e-14)
        assert losses["loss/like"].item() == pytest.approx(bce(logits[:, 2], labels[:, 2], like), rel=1e-14)
        assert losses["loss/time"].item() == pytest.approx(mse(logits[:, 1], labels[:, 1]), rel=1e-14)


@pytest.mark.parametrize("loss_type", [squared, {"a": squared, "b": squared, "c": "bce_with_logits"}])
def test_each_task_may_have_its_own_label_for_missing(loss_type: Any) -> None:
    labels = torch.tensor([[-1.0, math.nan, -1.0], [2.0, 3.0, 1.0], [7.0, 7.0, 0.5]], dtype=torch.float64)
    logits = torch.zeros(3, 3, dtype=torch.float64)
    loss = MultiTaskLoss(loss_type, ["a", "b", "c"], ignore_index={"a": 7, "b": math.nan})
    for given in (
        labels,
        dict(zip("abc", labels.unbind(1))),
        {**dict(zip("abc", labels.unbind(1))), "c": labels[:, 2].float()},
    ):
        losses = loss(logits, given)
        assert losses["loss/a"].item() == pytest.approx((1 + 4) / 2, rel=1e-14)
        assert losses["loss/b"].item() == pytest.approx((9 + 49) / 2, rel=1e-14)
        assert losses["loss/c"].isfinite()  # -1 is a label like any other there
    assert loss.ignore_index.keys() == {"a", "b"}  # type: ignore[union-attr]


def test_labels_for_missing_that_are_all_the_same_are_one() -> None:
    assert MultiTaskLoss(squared, ["a", "b"], ignore_index={"a": -1, "b": -1.0}).ignore_index == -1
    assert MultiTaskLoss(squared, ["a", "b"], ignore_index={}).ignore_index is None


def test_quality_is_of_the_binary_tasks() -> None:
    own = RankingQuality(["click", "like"], ignore_index={"like": -1.0}, window=3)
    loss = MultiTaskLoss(
        TYPES, NAMES, pos_weights={"click": 4.0}, ignore_index={"like": -1.0, "time": -1.0}, quality=own
    )
    assert loss.train_quality.tasks == ("click", "like")
    logits, labels = random_inputs()
    labels[0] = -1.0
    labels[0, 0] = 0.0
    loss(logits, labels)
    own.update(logits[:, [0, 2]], labels[:, [0, 2]])
    result = numbers(loss.train_quality.compute())
    assert result == pytest.approx(numbers(own.compute()), rel=1e-12)
    assert result["logloss/like"] == pytest.approx(bce(logits[1:, 2], labels[1:, 2]), rel=1e-12)
    assert result["weight/like"] == 5.0
    ragged, events = ragged_inputs()
    default = MultiTaskLoss(TYPES, NAMES, quality=True)
    default(ragged, events)
    assert default.train_quality.compute()["weight/click"] == 4.0
    assert default.train_quality.compute()["weight/like"] == 0.0


@pytest.mark.parametrize("other", [squared, LossType.CROSS_ENTROPY])
def test_quality_is_of_the_binary_tasks_also_where_they_come_last(other: Any) -> None:
    loss = MultiTaskLoss({"other": other, "click": "bce_with_logits"}, ["other", "click"], quality=True)
    shape = (4, 3) if other is LossType.CROSS_ENTROPY else (4,)
    logits = {"other": torch.full(shape, 5.0), "click": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    labels = {"other": torch.tensor([2, 1, 0, 2]), "click": torch.tensor([1, 0, 0, 1])}
    loss(logits, labels)
    found = numbers(loss.train_quality.compute())
    rows = list(zip(logits["click"].tolist(), labels["click"].tolist(), [1.0] * 4))
    assert_close(found, quality_reference.result({"click": rows}), 1e-6)


def test_settings_are_read_only_but_for_the_task_weights() -> None:
    loss = MultiTaskLoss({"a": squared, "b": Scaled()}, ["a", "b"], ignore_index={"a": -1})
    for name in ("loss_type", "loss_type_0", "loss_type_1", "pos_weights", "ignore_index"):
        with pytest.raises(AttributeError, match=f"^{name} is read-only: create a new loss$"):
            setattr(loss, name, None)
    loss.task_weights = {"a": 0.0, "b": 1.0}
    losses = loss(torch.ones(2, 2), torch.zeros(2, 2))
    assert losses["loss"].item() == pytest.approx(losses["loss/b"].item() / 2)


def test_sums_of_other_types_are_refused() -> None:
    loss, same, other = (
        MultiTaskLoss({"a": a, "b": squared}, ["a", "b"]) for a in ("bce_with_logits", "bce_with_logits", squared)
    )
    for each in (loss, same, other):
        each.train_metric.persistent(True)
    loss(torch.ones(2, 2), torch.zeros(2, 2))
    same.load_state_dict(loss.state_dict())
    assert numbers(same.train_metric.compute()) == numbers(loss.train_metric.compute())
    with pytest.raises(RuntimeError, match=r"loss_type=\['bce_with_logits', 'squared\(\)'\], expected"):
        other.load_state_dict(loss.state_dict())


class Model(nn.Module):
    """A head for each of the tasks, of which the last is one of classes, and their loss."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.form = form
        self.heads = nn.Linear(3, 3)
        self.stars = nn.Linear(3, 5)
        types = {**TYPES, "stars": "cross_entropy"} if form != "tensors" else TYPES
        self.loss = MultiTaskLoss(types, list(types), pos_weights={"like": 2.0}, ignore_index={"like": -1.0})

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The global loss."""
        heads = self.heads(features)
        if self.form == "tensors":
            return self.loss(heads, labels[:, :3])["loss"]
        logits = {"stars": self.stars(features), **dict(zip(NAMES, heads.unbind(1)))}
        targets = {"stars": labels[:, 3].long(), **dict(zip(NAMES, labels.unbind(1)))}
        if self.form == "ragged":
            rows = {"stars": 1, "click": 4, "time": 2, "like": 0}
            logits = {task: each[: rows[task]] for task, each in logits.items()}
            targets = {task: each[: rows[task]] for task, each in targets.items()}
        return self.loss(logits, targets)["loss"]


def model_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3), torch.randint(0, 2, (5, 4)).float()


FORMS = ["tensors", "mappings", "ragged"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("new_compiler")
def test_one_graph_and_no_recompilation(form: str) -> None:
    model, twin = Model(form), Model(form)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(6):
        batch = model_batch()
        loss, expected = compiled(*batch), twin(*batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        model.zero_grad()
        twin.zero_grad()
        loss.backward()
        expected.backward()
        for ours, theirs in zip(model.heads.parameters(), twin.heads.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad)
        model.loss.task_weights = twin.loss.task_weights = [1.0 + step] * len(model.loss.tasks or ())
    assert counter.frame_count == 1
    assert numbers(model.loss.train_metric.compute()) == pytest.approx(
        numbers(twin.loss.train_metric.compute()), rel=1e-6, nan_ok=True
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(form: str, reentrant: bool) -> None:
    model = Model(form)
    features, labels = model_batch()
    checkpoint(model, features.requires_grad_(), labels, use_reentrant=reentrant).backward()
    assert model.loss.train_metric.update_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_gives_the_same_and_counts_each_run_once(form: str) -> None:
    model, twin = Model(form), Model(form)

    class Outer(nn.Module):
        """The model, which torch.fx can't look into for the shapes that it reads."""

        def __init__(self) -> None:
            super().__init__()
            self.loss = model.loss

        def forward(self, logits: Any, labels: Any) -> Tensor:
            """The sum of what the loss gives by its keys."""
            losses = self.loss(logits, labels)
            return torch.stack([losses[key] for key in losses]).sum()

    tasks = list(model.loss.tasks or ())
    wide = {"stars": 5}
    inputs: Any = (
        {task: torch.randn(4, wide.get(task, 1)) for task in tasks},
        {task: torch.ones(4).long() for task in tasks},
    )
    if form == "tensors":
        inputs = torch.randn(4, 3), torch.ones(4, 3)
    traced = fx.symbolic_trace(Outer())
    for step in (1, 2):
        expected = torch.stack(list(twin.loss(*inputs).values())).sum()
        assert traced(*inputs).item() == pytest.approx(expected.item(), rel=1e-6)
        assert model.loss.train_metric.update_count == step


def test_labels_for_missing_by_task_under_vmap() -> None:
    loss = MultiTaskLoss(TYPES, NAMES, ignore_index={"click": -1.0, "time": 2.0})
    logits, labels = torch.randn(2, 4, 3), torch.tensor([-1.0, 2.0, 1.0]).repeat(2, 4, 1)
    labels[:, 1:] = torch.rand(2, 3, 3)
    found = torch.vmap(lambda x, y: loss(x, y)["loss"])(logits, labels)
    expected = torch.stack([loss(x, y)["loss"] for x, y in zip(logits, labels)])
    torch.testing.assert_close(found, expected)


def test_what_a_transform_runs_is_not_counted() -> None:
    loss = MultiTaskLoss(TYPES, NAMES)
    logits, labels = random_inputs()
    gradient = torch.func.grad(lambda x: loss(x, labels)["loss"])(logits)
    assert loss.train_metric.update_count == 0
    expected = torch.autograd.grad(loss(logits.requires_grad_(), labels)["loss"], logits)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_second_derivatives_go_through_rows_of_their_own() -> None:
    logits, labels = ragged_inputs()
    inputs = [logits["click"], logits["time"]]
    first = torch.autograd.grad(MultiTaskLoss(TYPES, NAMES)(logits, labels)["loss"], inputs, create_graph=True)
    second = torch.autograd.grad(torch.cat([each.flatten() for each in first]).sum(), inputs)
    sigmoids = [reference.sigmoid(x) for x in logits["click"].flatten().tolist()]
    assert second[0].flatten().tolist() == pytest.approx([s * (1 - s) / 8 for s in sigmoids], rel=1e-12)
    assert second[1].tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


def test_one_task_with_a_type_by_name_is_the_one_task_loss() -> None:
    logits, labels = random_inputs()
    alone = Loss(squared)(logits[:, 1], labels[:, 1]).item()
    assert MultiTaskLoss({"time": squared}, ["time"])(logits[:, 1:2], labels[:, 1:2])["loss"].item() == alone


def test_quality_of_rows_of_their_own_is_that_of_each_binary_task_by_itself() -> None:
    missing = {"click": -1.0, "like": math.nan}
    loss = MultiTaskLoss(TYPES, NAMES, pos_weights={"like": 3.0}, ignore_index=missing, quality=True)
    logits = {task: torch.randn(rows, dtype=torch.float64) for task, rows in zip(NAMES, (5, 2, 3))}
    labels = {
        "click": torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0]),
        "time": torch.rand(2),
        "like": torch.tensor([math.nan, 1.0, 0.0]),
    }
    weights = {task: torch.rand(len(each), dtype=torch.float64) for task, each in labels.items()}
    loss(logits, labels, weights)
    columns = {
        task: [
            (x, y, w)
            for x, y, w in zip(logits[task].tolist(), labels[task].tolist(), weights[task].tolist(), strict=True)
            if y in (0.0, 1.0)
        ]
        for task in ("click", "like")
    }
    assert_close(numbers(loss.train_quality.compute()), quality_reference.result(columns))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_module_is_cast_with_the_loss_and_the_sums_are_not(dtype: torch.dtype) -> None:
    module = Scaled()
    loss = MultiTaskLoss({"a": module, "b": "bce_with_logits"}, ["a", "b"], pos_weights={"b": 2.0}).to(dtype)
    losses = loss(torch.ones(2, 2, dtype=dtype), torch.zeros(2, 2))
    assert module.scale.dtype == dtype
    expected = [0.25 + 2 * math.log(2), reference.softplus(1.0)]
    precision = torch.finfo(dtype).eps if dtype == torch.float16 else 1e-14
    for found in (losses, loss.train_metric.compute()):
        assert [found["loss/a"].item(), found["loss/b"].item()] == pytest.approx(expected, rel=max(precision, 1e-7))
    assert loss.train_metric.totals.dtype == torch.float64
    assert losses["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_to_the_meta_device_and_back() -> None:
    """The groups' order, factors and parameters go with it."""
    module = Scaled()
    types: dict[str, Any] = {"a": module, "b": "bce_with_logits", "c": module}
    loss = MultiTaskLoss(types, ["a", "b", "c"], pos_weights={"b": 2.0}, task_weights=[1.0, 2.0, 3.0])
    loss.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        module.scale.fill_(2.0)
    loss.train_metric.reset()
    labels = torch.tensor([[0.0, 1.0, -1.0]] * 2, dtype=torch.float64)
    losses = loss(torch.ones(2, 3, dtype=torch.float64), labels)
    by_task = [0.25 + 2 * math.log(2), 2 * reference.softplus(-1.0), 1.0 + 2 * math.log(2)]
    total = math.fsum(w * each for w, each in zip((1, 2, 3), by_task)) / 3
    for found in (losses, loss.train_metric.compute()):
        assert list(numbers(found).values()) == pytest.approx([*by_task, total], rel=1e-6)


def test_groups_whose_weights_are_a_number_and_sums() -> None:
    """Classes of which no label can be missing, before binary tasks of which one is."""
    types: dict[str, Any] = {"a": "cross_entropy", "b": "bce_with_logits", "c": "bce_with_logits"}
    loss = MultiTaskLoss(types, list(types), ignore_index={"b": -1})
    losses = loss(
        {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(2)},
        {"a": torch.tensor([0, 1]), "b": torch.tensor([1.0, -1.0]), "c": torch.ones(2)},
    )
    expected = {"loss/a": math.log(3), "loss/b": math.log(2), "loss/c": math.log(2)}
    expected["loss"] = math.fsum(expected.values()) / 3
    assert numbers(losses) == pytest.approx(expected, rel=1e-6)
    assert numbers(loss.train_metric.compute()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_type_has_its_gradient_in_compiled_code(dtype: torch.dtype, new_compiler: None) -> None:
    """Of two rows with logits of 0, in the mean over two tasks."""
    types: dict[str, Any] = {"click": "bce_with_logits", "stars": "cross_entropy"}
    loss = torch.compile(MultiTaskLoss(types, ["click", "stars"]), fullgraph=True, backend="aot_eager")
    logits = {"click": torch.zeros(2, dtype=dtype), "stars": torch.zeros(2, 2, dtype=dtype)}
    for each in logits.values():
        each.requires_grad_()
    labels = {"click": torch.ones(2), "stars": torch.ones(2, dtype=torch.int64)}
    loss(logits, labels)["loss"].backward()
    assert logits["click"].grad is not None
    assert logits["stars"].grad is not None
    assert logits["click"].grad.tolist() == [-0.125, -0.125]
    assert logits["stars"].grad.tolist() == [[0.125, -0.125]] * 2
