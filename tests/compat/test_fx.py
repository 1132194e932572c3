"""torch.fx, by which TorchRec's pipelines read a model, and torch.jit: a loss that is in a model is no obstacle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.cases import Rows, Settings
from tests.support.gradient_errors import case_parts, errors_of, flat_gradients
from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality

TASKS = ["like", "reply"]
POSITIVE = [2.0, 3.0]
Numbers = dict[str, float]


class LeavesOfTorch(fx.Tracer):
    """Traces into all that is not torch's own."""

    def is_leaf_module(self, m: nn.Module, _: str) -> bool:
        """Whether it is one node."""
        return m.__module__.startswith("torch.nn.")


class LossIsALeaf(fx.Tracer):
    """Looks into no loss."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it is one node."""
        return isinstance(m, (Loss, MultiTaskLoss)) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module, tracer: type[fx.Tracer] = fx.Tracer) -> fx.GraphModule:
    return fx.GraphModule(model, tracer().trace(model))


class Model(nn.Module):
    """A linear ranker with the loss of several tasks, used as ``use`` says."""

    def __init__(self, use: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.heads = nn.Linear(3, 2, dtype=torch.float64)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=POSITIVE, **options)
        self.use = use

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor, normalizer: Tensor) -> Any:
        """What ``use`` makes of the inputs."""
        return self.use(self.loss, self.heads(features), labels, weights, normalizer)


def batch() -> tuple[Tensor, ...]:
    weights = torch.rand(5, 2, dtype=torch.float64)
    weights[1, 0] = 0.0
    return (
        torch.randn(5, 3, dtype=torch.float64),
        torch.rand(5, 2, dtype=torch.float64),
        weights,
        torch.tensor(8.0, dtype=torch.float64),
    )


def oracle(
    model: Model, features: Tensor, labels: Tensor, weights: Tensor | None, normalizer: float | None
) -> tuple[dict[str, float], Tensor]:
    """The losses, and the gradient of the global one by the matrix, of plain torch."""
    matrix = model.heads.weight.detach().clone().requires_grad_()
    logits = features @ matrix.T + model.heads.bias.detach()
    positive = torch.tensor(POSITIVE, dtype=torch.float64)
    sums = F.binary_cross_entropy_with_logits(logits, labels, weights, pos_weight=positive, reduction="none").sum(0)
    losses = sums / (len(features) if normalizer is None else normalizer)
    result = dict(zip(["loss/like", "loss/reply", "loss"], [*losses.tolist(), losses.mean().item()]))
    return result, torch.autograd.grad(losses.mean(), matrix)[0]


def by_items(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    losses = loss(x, y)
    assert isinstance(losses, dict)
    return {key: 1.0 * value for key, value in losses.items()}


def by_key(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    losses = loss(x, y)
    assert list(losses) == ["loss/like", "loss/reply", "loss"]
    return {key: losses[key] for key in ("loss/like", "loss/reply", "loss")}


def the_global_one(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    return {"loss": loss(x, y)["loss"]}


def as_it_is(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    return loss(x, y)


def with_weights(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    return loss(x, y, w)


def with_keywords(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    return loss(logits=x, labels=y, weights=w, normalizer=n)


def of_mappings(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    logits = {task: x[:, t] for t, task in enumerate(TASKS)}
    labels = {task: y[:, t] for t, task in enumerate(TASKS)}
    return loss(logits, labels, weights={task: w[:, t] for t, task in enumerate(TASKS)}, normalizer=n)


def sums_of(x: Any, y: Any, w: Any) -> Any:
    """Σ w·l of each task, ``(tasks,)``, made in the model."""
    positive = torch.tensor(POSITIVE, dtype=torch.float64)
    return F.binary_cross_entropy_with_logits(x, y, w, pos_weight=positive, reduction="none").sum(0)


def of_sums(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    return loss.from_sums(sums_of(x, y, None), 5)


def of_weighted_sums(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    losses = loss.from_sums(sums_of(x, y, w), weight=(w < 2).sum(0), normalizer=n)
    assert isinstance(losses, dict)
    return dict(losses.items())


def of_sums_by_task(loss: MultiTaskLoss, x: Any, y: Any, w: Any, n: Any) -> Any:
    sums = sums_of(x, y, w)
    rows = (w < 2).sum(0)
    return loss.from_sums({"reply": sums[1], "like": sums[0]}, {"like": rows[0], "reply": 5}, normalizer=n)


# How forward calls the loss, and whether with the weights and with the normalizer.
USES: dict[str, tuple[Callable[..., Any], bool, bool]] = {
    "items": (by_items, False, False),
    "keys": (by_key, False, False),
    "as it is": (as_it_is, False, False),
    "weights": (with_weights, True, False),
    "keywords": (with_keywords, True, True),
    "mappings": (of_mappings, True, True),
    "sums": (of_sums, False, False),
    "sums and all else": (of_weighted_sums, True, True),
    "sums by task": (of_sums_by_task, True, True),
}


def update_counts(model: Any) -> tuple[int, int]:
    return model.loss.train_metric.update_count, model.loss.eval_metric.update_count


def expect_trained(graph: Any, inputs: tuple[Tensor, ...], exact: Numbers, gradient: Tensor) -> None:
    """A step: the numbers and the gradient, and the batch is counted once."""
    before = update_counts(graph)
    losses = graph(*inputs)
    assert list(losses) == list(exact)
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(exact, rel=1e-12)
    graph.heads.zero_grad()
    losses["loss"].backward()
    assert torch.allclose(graph.heads.weight.grad, gradient, rtol=1e-12, atol=1e-15)
    assert update_counts(graph) == (before[0] + 1, before[1])


@pytest.mark.parametrize("tracer", [fx.Tracer, LeavesOfTorch])
@pytest.mark.parametrize("use", USES)
def test_a_traced_model_gives_the_numbers_and_gradients_of_the_model(use: str, tracer: type[fx.Tracer]) -> None:
    function, weighted, normalized = USES[use]
    model, inputs = Model(function), batch()
    graph: Any = traced(model, tracer)
    assert update_counts(model) == (0, 0)
    exact = oracle(model, inputs[0], inputs[1], inputs[2] if weighted else None, 8.0 if normalized else None)
    expect_trained(graph, inputs, *exact)
    expect_trained(graph, inputs, *exact)
    # The running sums are of the rows whatever the normalizer.
    means = oracle(model, inputs[0], inputs[1], inputs[2] if weighted else None, None)[0]
    computed = {key: value.item() for key, value in graph.loss.train_metric.compute().items()}
    assert computed == pytest.approx(means, rel=1e-12)


def test_the_loss_is_one_node() -> None:
    for tracer in (fx.Tracer, LeavesOfTorch, LossIsALeaf):
        graph = traced(Model(the_global_one), tracer).graph
        assert [str(node.target) for node in graph.nodes if node.op == "call_module"] == ["heads", "loss"]


def test_symbolic_trace_itself() -> None:
    model, inputs = Model(by_items), batch()
    expect_trained(fx.symbolic_trace(model), inputs, *oracle(model, inputs[0], inputs[1], None, None))


def test_a_loss_that_is_a_leaf_of_the_tracer_is_read_by_its_keys() -> None:
    model, inputs = Model(the_global_one), batch()
    exact, gradient = oracle(model, inputs[0], inputs[1], None, None)
    expect_trained(traced(model, LossIsALeaf), inputs, {"loss": exact["loss"]}, gradient)


def test_train_and_eval_choose_the_metric() -> None:
    model, inputs = Model(by_items), batch()
    exact = oracle(model, inputs[0], inputs[1], None, None)[0]
    graph: Any = traced(model)
    graph.eval()
    with torch.no_grad():
        graph(*inputs)
        assert update_counts(graph) == (0, 1)
        graph(*inputs)
    graph.train()
    graph(*inputs)
    assert update_counts(graph) == (1, 2)
    for metric in (graph.loss.train_metric, graph.loss.eval_metric):
        assert {key: value.item() for key, value in metric.compute().items()} == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
@pytest.mark.parametrize("use", [by_items, by_key, as_it_is])
def test_a_copy_of_a_traced_model_works_by_itself(duplicate: Callable[[Any], Any], use: Any) -> None:
    model, inputs = Model(use), batch()
    exact = oracle(model, inputs[0], inputs[1], None, None)
    graph = traced(model)
    for node in graph.graph.nodes:
        node.type = None  # torch can't pickle a type that is annotated as a string, as it is in this file
    graph.recompile()
    graph(*inputs)
    twin = duplicate(graph)
    expect_trained(twin, inputs, *exact)
    assert (update_counts(graph), update_counts(twin)) == ((1, 0), (2, 0))
    expect_trained(graph, inputs, *exact)


class OneTask(nn.Module):
    """A model with the loss of one task."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1, dtype=torch.float64)
        self.loss = loss

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Twice the loss."""
        return 2 * self.loss(self.head(features).squeeze(1), labels, weights)


@pytest.mark.parametrize("tracer", [fx.Tracer, LeavesOfTorch, LossIsALeaf])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_one_task(tracer: type[fx.Tracer], weighted: bool) -> None:
    model = OneTask(Loss("bce_with_logits", quality=True))
    features, labels, weights, _ = batch()
    given = weights[:, 0] if weighted else None
    graph: Any = traced(model, tracer)
    assert update_counts(graph) == (0, 0)
    result = graph(features, labels[:, 0], given)
    found = torch.autograd.grad(result, model.head.weight)[0]
    exact = 2 * F.binary_cross_entropy_with_logits(model.head(features).squeeze(1), labels[:, 0], given)
    assert result.item() == pytest.approx(exact.item(), rel=1e-12)
    assert torch.allclose(found, torch.autograd.grad(exact, model.head.weight)[0], rtol=1e-12)
    assert update_counts(graph) == (1, 0)
    assert graph.loss.train_quality.update_count == 1


def test_class_labels() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Linear(3, 8, dtype=torch.float64)
            self.loss = MultiTaskLoss("cross_entropy", TASKS)

        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            losses = self.loss(self.heads(features).view(-1, 2, 4), labels)
            return torch.stack([value for key, value in losses.items() if key != "loss"])

    model, features, labels = Classes(), batch()[0], torch.randint(0, 4, (5, 2))
    logits = model.heads(features).view(-1, 2, 4)
    exact = [F.cross_entropy(logits[:, t], labels[:, t]).item() for t in range(2)]
    assert traced(model)(features, labels).tolist() == pytest.approx(exact, rel=1e-12)
    assert model.loss.train_metric.update_count == 1


class WithGiven(nn.Module):
    """A model of which one task's rows are the loss's, and another's its own."""

    logits: Tensor

    def __init__(self, loss: MultiTaskLoss, form: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.heads = nn.Linear(3, 2, dtype=torch.float64)
        self.loss = loss
        self.form = form
        self.register_buffer("logits", torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, features: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """The losses."""
        logits = self.heads(features)
        aux = logits[:, 0].square().sum()
        pairs: dict[str, Any] = {"bare": aux, "pair": (aux, weight), "number": (aux, 4), "list": [aux, weight]}
        if self.form == "alone":
            # Nothing else is traced.
            return {**self.loss(self.logits, torch.ones(1, 1), given={"aux": (aux, weight)})}
        return {**self.loss(logits[:, 1:], labels, given={"aux": pairs[self.form]})}


GIVEN_TYPES: Any = {"aux": "given", "like": "bce_with_logits"}


@pytest.mark.parametrize("tracer", [fx.Tracer, LeavesOfTorch])
@pytest.mark.parametrize("form", ["bare", "pair", "number", "list", "alone"])
def test_a_given_loss_in_a_traced_model(form: str, tracer: type[fx.Tracer]) -> None:
    model = WithGiven(MultiTaskLoss(GIVEN_TYPES, list(GIVEN_TYPES)), form)
    graph: Any = traced(model, tracer)
    assert update_counts(model) == (0, 0)
    features, labels = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64)
    weight = torch.tensor(4.0, dtype=torch.float64)
    logits = model.heads(features)
    aux = logits[:, 0].square().sum() / (1 if form == "bare" else 4)
    like = F.binary_cross_entropy_with_logits(logits[:, 1:], labels)
    if form == "alone":
        like = F.softplus(torch.tensor(0.0, dtype=torch.float64))
    (exact,) = torch.autograd.grad((aux + like) / 2, model.heads.weight)
    for count in (1, 2):
        losses = graph(features, labels, weight)
        values = [aux.item(), like.item(), (aux + like).item() / 2]
        assert [value.item() for value in losses.values()] == pytest.approx(values, rel=1e-12)
        (found,) = torch.autograd.grad(losses["loss"], model.heads.weight)
        assert torch.allclose(found, exact, rtol=1e-12, atol=1e-15)
        assert update_counts(graph) == (count, 0)
    twin = copy.deepcopy(graph)
    twin(features, labels, weight)
    assert (update_counts(graph), update_counts(twin)) == ((2, 0), (3, 0))


class SumsOfOne(nn.Module):
    """A model that makes the sum of one task."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Twice the loss."""
        return 2 * self.loss.from_sums(rows.sum(), weight)


@pytest.mark.parametrize("tracer", [fx.Tracer, LeavesOfTorch, LossIsALeaf])
def test_the_sums_of_one_task(tracer: type[fx.Tracer]) -> None:
    model = SumsOfOne(Loss("given"))
    graph: Any = traced(model, tracer)
    for rows in (4, 7):
        assert graph(torch.ones(rows), torch.tensor(2 * rows)).item() == 1.0
    assert update_counts(graph) == (2, 0)


class Tempered(MultiTaskLoss):
    """A loss with a forward of its own."""

    def forward(
        self,
        logits: Any,
        labels: Any,
        weights: Any = None,
        *,
        normalizer: Any = None,
        given: Any = None,
        segments: Any = None,
    ) -> dict[str, Tensor]:
        """Of logits at a temperature."""
        asked = {"normalizer": normalizer, "given": given, "segments": segments}
        return super().forward(logits / 2.0, labels, weights, **asked)


class TemperedOne(Loss):
    """The same of one task."""

    def forward(
        self, logits: Any, labels: Any, weights: Any = None, *, normalizer: Any = None, segments: Any = None
    ) -> Tensor:
        """Of logits at a temperature."""
        return super().forward(logits / 2.0, labels, weights, normalizer=normalizer, segments=segments)


@pytest.mark.parametrize(
    "loss", [Tempered("bce_with_logits", TASKS), TemperedOne("bce_with_logits")], ids=lambda loss: type(loss).__name__
)
def test_what_a_subclass_does_to_its_inputs_is_done_once(loss: nn.Module) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, logits: Tensor, labels: Tensor) -> Any:
            return self.loss(logits, labels)

    logits, labels = torch.randn(4, 2, dtype=torch.float64), torch.ones(4, 2)
    result = fx.symbolic_trace(Holder())(logits, labels)
    value = result if isinstance(result, Tensor) else result["loss"]
    assert torch.allclose(value, F.binary_cross_entropy_with_logits(logits / 2, labels.double()), rtol=1e-12)


def test_what_a_subclass_does_beside_a_given_loss_is_done_once() -> None:
    model = WithGiven(Tempered(GIVEN_TYPES, list(GIVEN_TYPES)), "pair")
    inputs = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64), torch.tensor(4)
    found, exact = fx.symbolic_trace(model)(*inputs), model(*inputs)
    assert {key: value.item() for key, value in found.items()} == pytest.approx(
        {key: value.item() for key, value in exact.items()}, rel=1e-12
    )


def test_hooks_of_the_loss_run_once() -> None:
    def features_of(loss: MultiTaskLoss, logits: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        result: Tensor = loss(logits, labels)["loss"]
        return result

    model = Model(features_of)
    model.loss.register_forward_hook(lambda _, __, losses: {key: 2 * loss for key, loss in losses.items()})
    graph = traced(model)
    inputs = (torch.randn(4, 3, dtype=torch.float64), torch.ones(4, 2), torch.ones(4), torch.ones(()))
    assert torch.allclose(graph(*inputs), model(*inputs), rtol=1e-12)


@pytest.mark.parametrize(
    "loss", [Loss("bce_with_logits"), MultiTaskLoss("bce_with_logits", TASKS)], ids=["Loss", "MultiTaskLoss"]
)
def test_a_loss_that_no_model_holds_is_refused(loss: nn.Module) -> None:
    """A graph can't call its own root."""
    with pytest.raises(ValueError, match="model"):
        fx.symbolic_trace(loss)


def traced_step(rank: int, case: Settings, parts: list[Rows]) -> tuple[Numbers, list[list[float]]]:
    """One rank's losses, and gradients as DDP averages them, of a traced model."""
    graph: Any = fx.symbolic_trace(case.ranker(global_batch=True), {"normalizer": None})
    model = DistributedDataParallel(graph)
    losses: Mapping[str, Tensor] = model(parts[rank])
    losses["loss"].backward()
    return {key: value.item() for key, value in losses.items()}, flat_gradients(graph)


@pytest.mark.parametrize(("reduction", "form"), [("mean", "rows"), ("max", "rows"), ("max", "sums")])
def test_on_ranks_a_traced_step_is_that_of_one_process(two_ranks: RankPool, reduction: str, form: str) -> None:
    case = Settings(global_reduction=reduction, form=form)
    parts = case_parts(case, 2, weighted=True)
    errors = errors_of(case, parts, two_ranks.run(traced_step, case, parts))
    assert errors.loss <= 1e-12
    assert errors.gradient <= 1e-12


# torch.jit: of a model that has a loss, and does not call it in forward.


class Attached(nn.Module):
    """Something attached, and a forward that does not use it."""

    def __init__(self, attached: nn.Module) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2)
        self.attached = attached

    def forward(self, features: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.heads(features)
        return logits.relu()


ATTACHED: dict[str, Callable[[], nn.Module]] = {
    "Loss": lambda: Loss("bce_with_logits"),
    "MultiTaskLoss": lambda: MultiTaskLoss("bce_with_logits", TASKS, pos_weights=POSITIVE, quality=True),
    "classes": lambda: MultiTaskLoss("cross_entropy", TASKS, task_weights=[1.0, 2.0], global_batch=True),
    "sums": lambda: MultiTaskLoss("given", TASKS),
    "given": lambda: MultiTaskLoss(GIVEN_TYPES, list(GIVEN_TYPES), quality=True),
    "GlobalLoss": lambda: GlobalLoss(TASKS),
    "RankingQuality": lambda: RankingQuality(TASKS, window=3),
    "scalar view": lambda: GlobalLoss(TASKS).scalar("loss/like"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of scripts, and of a property that it reads
@pytest.mark.parametrize("attached", ATTACHED)
def test_a_model_with_a_loss_attached_can_be_scripted(attached: str) -> None:
    model, features = Attached(ATTACHED[attached]()), torch.randn(4, 3)
    scripted: Any = torch.jit.script(model)
    assert torch.equal(scripted(features), model(features))
    # The model's own goes on.
    model.eval()
    assert torch.equal(torch.jit.script(model)(features), model.heads(features).relu())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attached", ATTACHED)
def test_a_model_with_a_loss_attached_can_be_traced(attached: str) -> None:
    """For any number of rows."""
    model = Attached(ATTACHED[attached]())
    traced_by_jit: Any = torch.jit.trace(model, (torch.randn(4, 3),))
    for rows in (4, 7, 0):
        features = torch.randn(rows, 3)
        assert torch.equal(traced_by_jit(features), model(features))


class Calling(Attached):
    """A forward that uses what is attached, as ``use`` says."""

    def __init__(self, attached: nn.Module, use: Callable[..., Any]) -> None:
        super().__init__(attached)
        self.use = use

    def forward(self, features: Tensor) -> Tensor:
        """The logits, or their loss."""
        logits: Tensor = self.heads(features)
        result: Tensor = self.use(self.attached, logits)
        return result


def squares(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square()


def update_quality(metric: RankingQuality, logits: Tensor) -> Tensor:
    metric.update(logits, torch.ones(4, 2))
    return logits


def update_sums(metric: GlobalLoss, logits: Tensor) -> Tensor:
    metric.update(logits.sum(0), 4)
    return logits


CALLING: dict[str, tuple[nn.Module, Callable[..., Any]]] = {
    "Loss": (Loss("bce_with_logits"), lambda loss, logits: loss(logits, torch.ones(4, 2))),
    "callable": (Loss(squares), lambda loss, logits: loss(logits, torch.ones(4, 2))),
    "MultiTaskLoss": (
        MultiTaskLoss("bce_with_logits", TASKS, fused=True),
        lambda loss, logits: loss(dict(zip(TASKS, logits.unbind(1))), torch.ones(4, 2))["loss"],
    ),
    "sums": (MultiTaskLoss("given", TASKS), lambda loss, logits: loss.from_sums(logits.sum(0), 4)["loss"]),
    "given": (
        MultiTaskLoss(GIVEN_TYPES, list(GIVEN_TYPES)),
        lambda loss, logits: loss(logits[:, :1], torch.ones(4, 1), given={"aux": (logits.sum(), 4)})["loss"],
    ),
    "GlobalLoss": (GlobalLoss(TASKS), update_sums),
    "RankingQuality": (RankingQuality(TASKS), update_quality),
    "scalar view": (GlobalLoss(TASKS).scalar("loss/like"), update_sums),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the operations before an update
@pytest.mark.parametrize("calling", CALLING)
def test_a_trace_of_a_call_is_refused_in_one_line(calling: str) -> None:
    """It would make the number of rows a constant."""
    model, features = Calling(*CALLING[calling]), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.trace: got a call of a \w+, .* expected .*$") as caught:
        torch.jit.trace(model, (features,))
    assert "\n" not in str(caught.value)
    counted = model.attached
    assert not getattr(counted, "train_metric", counted).update_called
    model(features)  # the model's own goes on
    assert getattr(counted, "train_metric", counted).update_called
