"""One value of a metric as a metric: torchmetrics' life cycle, each view's own reset, and models that have one."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.support import reference
from tests.support.casts import CASTS
from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality, ScalarView

TASKS = ["like", "reply"]
# (loss sums, weights) of each batch.
Batch = tuple[list[float], list[float]]
EARLY: Batch = ([8.0, 3.0], [2.0, 1.0])
LATE: Batch = ([1.0, 5.0], [4.0, 2.0])
LATER: Batch = ([2.0, 1.0], [1.0, 8.0])


def expected(*batches: Batch, key: str = "loss", **rule: Any) -> float:
    """The oracle's loss: a row of weight n and loss s/n has the sums s and n."""
    columns = {
        task: [reference.Row(sums[i] / weights[i], weight=weights[i]) for sums, weights in batches if weights[i]]
        for i, task in enumerate(TASKS)
    }
    return reference.losses(columns, reference.Rule(mean_over="weights", **rule))[key]


def feed(metric: Any, *batches: Batch) -> Any:
    for sums, weights in batches:
        metric.update(torch.tensor(sums, dtype=torch.float64), torch.tensor(weights))
    return metric


def value(metric: Any) -> float:
    """The value of a view, or the global loss of an owner."""
    result = metric.compute()
    number: float = (result["loss"] if isinstance(result, dict) else result).item()
    return number


def pair(key: str = "loss", **kwargs: Any) -> tuple[GlobalLoss, ScalarView]:
    owner = GlobalLoss(TASKS, **kwargs)
    return owner, owner.scalar(key)


def close(number: float) -> Any:
    return pytest.approx(number, rel=1e-14)


class Model(nn.Module):
    """A model that has a loss, and beside it a view of the loss's running sums."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS)
        self.logged = self.loss.train_metric.scalar("loss/reply")

    def forward(self, features: Tensor) -> Tensor:
        """The global loss of the features' first columns as labels."""
        loss: Tensor = self.loss(self.heads(features), features[:, :2].sigmoid())["loss"]
        return loss


# The value.


def test_update_goes_on_after_compute() -> None:
    """Nothing is cached."""
    owner, view = pair()
    for step, batch in enumerate((EARLY, LATE, LATER)):
        feed(view if step % 2 else owner, batch)
        assert value(view) == close(expected(*(EARLY, LATE, LATER)[: step + 1]))


def test_before_any_update_a_view_is_nan_and_says_so() -> None:
    owner, view = pair()
    assert (view.update_called, view.update_count) == (False, 0)
    with pytest.warns(UserWarning, match="before update"):
        assert view.compute().isnan()
    feed(owner, EARLY)
    view.reset()
    with pytest.warns(UserWarning, match="before update"):
        assert view.compute().isnan()
    assert value(owner) == close(expected(EARLY))


# Resets.


def test_each_view_counts_from_its_own_reset() -> None:
    owner, whole = pair()
    first, second = owner.scalar("loss"), owner.scalar("loss")
    feed(owner, EARLY)
    first.reset()
    feed(owner, LATE)
    second.reset()
    feed(owner, LATER)
    assert value(owner) == value(whole) == close(expected(EARLY, LATE, LATER))
    assert value(first) == close(expected(LATE, LATER))
    assert value(second) == close(expected(LATER))
    first.reset()
    feed(owner, EARLY)
    assert [value(each) for each in (first, second)] == [close(expected(EARLY)), close(expected(LATER, EARLY))]
    assert owner.update_count == 4


def test_the_owners_reset_starts_every_view_anew() -> None:
    owner, whole = pair()
    feed(owner, EARLY)
    view = owner.scalar("loss")
    view.reset()
    feed(owner, LATE)
    owner.reset()
    for each in (owner, whole, view):
        assert value(feed(owner, LATER)) == value(each)
        owner.reset()
    feed(owner, LATER)
    assert value(view) == close(expected(LATER))
    view.reset()
    feed(owner, EARLY)
    assert value(view) == close(expected(EARLY))


def test_a_task_without_rows_since_the_reset_has_no_data() -> None:
    owner, view = pair("loss/like")
    both = owner.scalar("loss")
    feed(owner, EARLY)
    view.reset()
    both.reset()
    feed(owner, ([0.0, 6.0], [0.0, 3.0]))
    assert math.isnan(value(view))
    assert value(both) == close(2.0)


@pytest.mark.parametrize("error_first", [True, False])
def test_a_view_raises_for_what_was_not_finite_since_its_own_reset(error_first: bool) -> None:
    owner, view = pair(nan_strategy="error")
    bad: Batch = ([math.nan, 1.0], [1.0, 1.0])
    feed(owner, bad if error_first else EARLY)
    view.reset()
    feed(owner, EARLY if error_first else bad)
    if error_first:
        assert value(view) == close(expected(EARLY))
    else:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"not finite: like: 1$"):
                view.compute()
    with pytest.raises(RuntimeError, match=r"not finite: like: 1$"):
        owner.compute()
    owner.reset()
    feed(owner, LATE)
    assert value(view) == value(owner) == close(expected(LATE))


def test_an_error_in_a_views_compute_leaves_the_owner_as_it_was() -> None:
    def broken(losses: Tensor) -> Tensor:
        raise ArithmeticError

    owner, view = pair("loss", global_reduction=broken)
    feed(owner, EARLY)
    view.reset()
    feed(owner, LATE)
    before = owner.totals.clone()
    with pytest.raises(ArithmeticError):
        view.compute()
    assert torch.equal(owner.totals, before)


def test_what_was_let_in_leaves_the_sums_at_the_owners_reset_only() -> None:
    owner, view = pair(nan_strategy="disable")
    feed(owner, ([math.nan, 1.0], [1.0, 1.0]))
    view.reset()
    feed(owner, EARLY)
    assert math.isnan(value(view))
    owner.reset()
    feed(owner, EARLY)
    assert value(view) == close(expected(EARLY))


def test_a_merge_into_the_owner_is_of_rows_that_come_after_the_reset() -> None:
    owner, view = pair()
    feed(owner, EARLY)
    view.reset()
    owner.merge_state(feed(GlobalLoss(TASKS), LATE))
    assert value(view) == close(expected(LATE))
    assert value(owner) == close(expected(EARLY, LATE))


def test_a_checkpoint_that_is_loaded_makes_earlier_resets_void() -> None:
    owner, view = pair()
    owner.persistent(True)
    feed(owner, EARLY, EARLY)
    view.reset()
    state = feed(GlobalLoss(TASKS), LATE)
    state.persistent(True)
    owner.load_state_dict(state.state_dict())
    feed(owner, LATER)
    assert value(view) == value(owner) == close(expected(LATE, LATER))
    view.reset()
    feed(owner, EARLY)
    assert value(view) == close(expected(EARLY))


# Figures. A sum of n updates of about the same size is rounded n times, by 2^-53 of what it then is, so that the part
# of k updates is off by no more than k * 2^-53 * (n + k) / k of itself, and by much less as a rule.


@pytest.mark.parametrize("window", [1, 100, 10_000])
def test_a_late_reset_costs_few_digits(window: int) -> None:
    """After the sums of a million updates; a float32 difference would have no right digit."""
    lifetime = 10**6
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(window, 2, dtype=torch.float64, generator=generator) + 0.5
    owner, view = pair()
    # As large as the sums of a million updates of 1024 rows, and not round.
    owner.update(torch.full((2,), 1024 * lifetime / 3, dtype=torch.float64), 1024 * lifetime)
    view.reset()
    for row in 1024 * losses:
        owner.update(row, 1024)
    exact = math.fsum(losses.flatten().tolist()) / (2 * window)
    assert value(view) == pytest.approx(exact, rel=2**-53 * (lifetime + window))
    assert view.compute().item() == pytest.approx(exact, rel=1e-12 if window > 100 else 1e-10)


def test_weights_that_are_whole_numbers_lose_nothing() -> None:
    owner, view = pair("loss/like", task_loss_reduction="sum")
    owner.update(torch.full((2,), 2.0**52), 2**52)
    view.reset()
    owner.update(torch.ones(2), 1)
    assert value(view) == 1.0


# Life cycle.


def test_constants_cannot_be_set() -> None:
    _, view = pair()
    assert view.higher_is_better is False
    for name in ("higher_is_better", "is_differentiable", "full_state_update", "plot_lower_bound"):
        with pytest.raises(RuntimeError, match=f"Can't change const `{name}`"):
            setattr(view, name, None)


def test_hash_is_of_the_instance() -> None:
    owner, view = pair()
    twin = owner.scalar("loss")
    assert hash(view) == hash(view)
    assert len({view, view, twin, owner}) == 3
    before = hash(view)
    feed(owner, EARLY)
    view.reset()
    assert hash(view) == before


def test_repr_names_the_key() -> None:
    assert repr(pair("loss/like")[1]) == "ScalarView('loss/like')"


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "clone": lambda view: view.clone(),
    "pickle": lambda view: pickle.loads(pickle.dumps(view)),
}


def saved_whole(view: Any) -> Any:
    file = io.BytesIO()
    torch.save(view, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [*DUPLICATES.values(), saved_whole], ids=[*DUPLICATES, "torch.save"])
def test_a_copy_has_a_copy_of_the_owner_and_its_own_reset(duplicate: Callable[[Any], Any]) -> None:
    owner, view = pair("loss/like")
    feed(owner, EARLY)
    view.reset()
    feed(owner, LATE)
    twin = duplicate(view)
    assert twin.owner is not owner
    assert (twin.key, twin.higher_is_better) == ("loss/like", False)
    feed(twin, LATER)
    assert value(twin) == close(expected(LATE, LATER, key="loss/like"))
    assert value(view) == close(expected(LATE, key="loss/like"))
    with pytest.raises(RuntimeError, match="const"):
        twin.higher_is_better = True


def test_a_shallow_copy_has_the_same_owner() -> None:
    owner, view = pair()
    twin = copy.copy(view)
    feed(owner, EARLY)
    assert value(twin) == value(view)
    twin.reset()
    feed(owner, LATE)
    assert (value(twin), value(view)) == (close(expected(LATE)), close(expected(EARLY, LATE)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_reads_its_own_loss(duplicate: Callable[[Any], Any]) -> None:
    model = Model()
    twin = duplicate(model)
    assert twin.logged.owner is twin.loss.train_metric
    twin(torch.randn(4, 3))
    assert (model.logged.update_count, twin.logged.update_count) == (0, 1)


def test_a_view_has_nothing_to_sync_itself() -> None:
    _, view = pair()
    view.sync()
    with pytest.raises(TorchMetricsUserError, match="already been un-synced"):
        view.unsync()


def test_inference_mode_does_not_spoil_a_view() -> None:
    owner, view = pair()
    feed(owner, EARLY)
    with torch.inference_mode():
        view.reset()
        feed(owner, LATE)
        assert value(view) == close(expected(LATE))
    feed(owner, LATER)
    assert value(view) == close(expected(LATE, LATER))
    view.reset()
    feed(owner, LATE)
    assert value(view) == close(expected(LATE))


# In a model.


@pytest.mark.parametrize("persistent", [False, True])
def test_a_view_adds_nothing_to_a_model(persistent: bool) -> None:
    model = Model()
    bare = nn.ModuleDict({"heads": model.heads, "loss": model.loss})
    for metric in (model.loss.train_metric, model.logged):
        metric.persistent(persistent)
    model(torch.randn(4, 3))
    model.logged.reset()
    assert list(model.state_dict()) == list(bare.state_dict())
    assert any("sums" in name for name in model.state_dict()) == persistent
    assert [name for name, _ in model.named_parameters()] == ["heads.weight", "heads.bias"]
    assert list(model.buffers()) == []
    names = [name for name, _ in model.named_modules()]
    assert names == [*(name for name, _ in bare.named_modules()), "logged"]
    other = Model()
    for metric in (other.loss.train_metric, other.logged):
        metric.persistent(persistent)
    other.load_state_dict(model.state_dict())
    assert other.logged.update_count == int(persistent)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_the_model_leave_view_and_owner_exact(cast: Callable[[nn.Module], Any]) -> None:
    model = Model()
    owner, view = model.loss.train_metric, model.logged
    exact = 1e8 + 1 / 3
    owner.update(torch.tensor([0.0, 1e12], dtype=torch.float64), 1)
    view.reset()
    cast(model)
    owner.update(torch.tensor([0.0, exact], dtype=torch.float64), 1)
    cast(model)
    assert value(view) == pytest.approx(exact, rel=2**-53 * 1e4)
    assert view.compute().dtype == torch.float64


def test_a_view_by_itself_can_be_moved_and_cast() -> None:
    owner, view = pair()
    feed(owner, EARLY)
    for move in (view.half, view.cpu, lambda: view.to("meta"), lambda: view.to_empty(device="meta")):
        assert move() is view
    assert view.device == owner.device == torch.device("cpu")
    assert value(view) == close(expected(EARLY))


def test_a_model_from_the_meta_device_has_a_view_that_works() -> None:
    with torch.device("meta"):
        model = Model()
    assert model.logged.device.type == "meta"
    model.to_empty(device="cpu")
    feed(model.loss.train_metric, EARLY)
    assert value(model.logged) == close(expected(EARLY, key="loss/reply"))
    model.logged.reset()
    feed(model.loss.train_metric, LATE)
    assert value(model.logged) == close(expected(LATE, key="loss/reply"))


def test_a_trip_to_the_meta_device_makes_earlier_resets_void() -> None:
    owner, view = pair()
    feed(owner, EARLY)
    view.reset()
    owner.to("meta")
    owner.to_empty(device="cpu")
    feed(owner, LATE)
    assert value(view) == value(owner) == close(expected(LATE))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_feeds_its_view_and_its_resets_recompile_nothing() -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    batches = [torch.randn(5, 3) for _ in range(4)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for features in batches:
            model.logged.reset()
            compiled(features).backward()
            logits, labels = model.heads(features).detach().double(), features[:, :2].sigmoid()
            losses = [
                reference.bce_with_logits(x, y) for x, y in zip(logits[:, 1].tolist(), labels.double()[:, 1].tolist())
            ]
            assert value(model.logged) == pytest.approx(math.fsum(losses) / 5, rel=1e-6)
    assert model.loss.train_metric.update_count == 4


# On ranks.

# The batches of each rank before and after the reset of the view; a rank may have none.
SPLITS: dict[str, list[tuple[list[Batch], list[Batch]]]] = {
    "even": [([EARLY], [LATE]), ([LATE], [LATER])],
    "uneven": [([EARLY, LATE], [LATER, LATER, EARLY]), ([LATER], [LATE])],
    "a rank without rows": [([], []), ([EARLY], [LATE, LATER])],
    "none after the reset on a rank": [([EARLY], []), ([LATE], [LATER])],
    "none before it on a rank": [([EARLY], [LATE]), ([], [LATER])],
}


def views_on_a_rank(rank: int, split: list[tuple[list[Batch], list[Batch]]]) -> tuple[float, ...]:
    """A view's value, one without a reset, the owner's, the view's where rank 0 alone starts it anew; after a reset."""
    owner = GlobalLoss(TASKS)
    whole, late, uneven = (owner.scalar("loss") for _ in range(3))
    before, after = split[rank]
    feed(owner, *before)
    late.reset()
    if rank == 0:
        uneven.reset()
    feed(owner, *after)
    local = owner.totals.clone()
    values = (value(late), value(whole), value(owner), value(uneven))
    assert torch.equal(owner.totals, local)
    owner.reset()
    feed(owner, LATE)
    return (*values, value(late))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_view_is_of_the_rows_of_all_ranks_since_its_reset(
    two_ranks: RankPool, split: list[tuple[list[Batch], list[Batch]]]
) -> None:
    (before, after), (others_before, others_after) = split
    oracle = (
        close(expected(*after, *others_after)),
        close(expected(*before, *after, *others_before, *others_after)),
        close(expected(*before, *after, *others_before, *others_after)),
        close(expected(*after, *others_before, *others_after)),
        close(expected(LATE, LATE)),
    )
    assert two_ranks.run(views_on_a_rank, split) == [oracle, oracle]


def synced_on_a_rank(rank: int) -> tuple[float, str, float]:
    owner, view = pair()
    late = owner.scalar("loss")
    feed(owner, (EARLY, LATE)[rank])
    late.reset()
    owner.sync()
    synced, message = value(view), ""
    try:
        late.compute()
    except TorchMetricsUserError as error:
        message = str(error)
    owner.unsync()
    feed(owner, LATER)
    return synced, message, value(late)


def test_between_sync_and_unsync_a_view_of_all_rows_is_of_all_ranks(two_ranks: RankPool) -> None:
    for synced, message, late in two_ranks.run(synced_on_a_rank):
        assert synced == close(expected(EARLY, LATE))
        assert "between sync() and unsync()" in message
        assert late == close(expected(LATER, LATER))


def views_in_ddp(rank: int) -> tuple[float, float]:
    """The view's value on a rank, after uneven steps in a model that DDP wraps, and the sum of this rank's rows."""
    model = DistributedDataParallel(Model(), find_unused_parameters=False)
    inner = model.module
    rows: list[float] = []
    for step in range(3):
        if step == 1:
            inner.logged.reset()
            rows.clear()
        features = torch.randn(2 + 5 * rank, 3, generator=torch.Generator().manual_seed(10 * rank + step))
        logits, labels = inner.heads(features).detach().double(), features[:, :2].sigmoid().double()
        rows += [reference.bce_with_logits(x, y) for x, y in zip(logits[:, 1].tolist(), labels[:, 1].tolist())]
        model(features).backward()
    packed = torch.tensor([math.fsum(rows), len(rows)], dtype=torch.float64)
    dist.all_reduce(packed)
    return value(inner.logged), (packed[0] / packed[1]).item()


def test_a_view_in_a_model_that_ddp_wraps(two_ranks: RankPool) -> None:
    for got, oracle in two_ranks.run(views_in_ddp):
        assert got == pytest.approx(oracle, rel=1e-6)


def test_a_view_of_a_single_loss_follows_its_mode() -> None:
    loss = Loss("bce_with_logits")
    train, evaluation = loss.train_metric.scalar("loss"), loss.eval_metric.scalar("loss")
    loss(torch.zeros(3), torch.ones(3))
    loss.eval()
    loss(torch.full((2,), 100.0), torch.zeros(2))
    assert [value(train), value(evaluation)] == pytest.approx([math.log(2), 100.0], rel=1e-6)


# Beside other metrics, and as the owner.


@pytest.mark.parametrize("compute_groups", [False, True])
def test_a_collection_gives_a_view_the_keywords_of_its_owner(compute_groups: bool) -> None:
    """And other metrics theirs."""
    owner, view = pair("loss/like")
    quality = RankingQuality(TASKS)
    metrics: Any = {"like": view, "accuracy": BinaryAccuracy(), "calibration": quality.scalar("calibration/reply")}
    collection = MetricCollection(metrics, compute_groups=compute_groups)
    predictions, targets = torch.tensor([0.9, 0.2, 0.7, 0.6]), torch.tensor([1, 0, 0, 1])
    logits, labels = torch.zeros(4, 2), torch.tensor([[1, 1], [0, 0], [0, 0], [0, 0]])
    for sums, weights in (EARLY, LATE):
        given = {"loss_sum": torch.tensor(sums), "weight": torch.tensor(weights), "preds": predictions}
        collection.update(**given, target=targets, logits=logits, labels=labels)
    assert owner.update_count == quality.update_count == 2
    results = collection.compute()
    assert results["like"].item() == pytest.approx(expected(EARLY, LATE, key="loss/like"), rel=1e-6)
    assert results["accuracy"].item() == 0.75
    assert results["calibration"].item() == pytest.approx(2.0, rel=1e-6)


def test_a_collections_forward_gives_a_view_its_keywords_too() -> None:
    owner, view = pair()
    collection = MetricCollection({"loss": view, "accuracy": BinaryAccuracy()})
    given = {"loss_sum": torch.tensor(EARLY[0]), "weight": torch.tensor(EARLY[1])}
    results = collection(**given, preds=torch.tensor([0.9, 0.2]), target=torch.tensor([1, 1]))
    assert results["loss"].item() == pytest.approx(expected(EARLY), rel=1e-6)
    assert results["accuracy"].item() == 0.5
    assert owner.update_count == 1


@pytest.mark.parametrize("on_step", [False, True])
def test_a_view_has_the_settings_of_its_owner(on_step: bool) -> None:
    for owner, key in (
        (GlobalLoss(TASKS, dist_sync_on_step=on_step), "loss"),
        (RankingQuality(TASKS, dist_sync_on_step=on_step), "ne/like"),
    ):
        view = owner.scalar(key)
        assert view.is_differentiable is owner.is_differentiable is False
        assert view.dist_sync_on_step is owner.dist_sync_on_step is on_step
        # torchmetrics 1.0.3 has no such property.
        assert getattr(view, "dtype", None) == getattr(owner, "dtype", None)


def test_set_dtype_of_a_view_is_that_of_its_owner() -> None:
    (owner, view), (twin, _) = pair(), pair()
    feed(owner, EARLY)
    feed(twin, EARLY)
    twin.set_dtype(torch.float16)
    assert view.set_dtype(torch.float16) is view
    assert getattr(view, "dtype", None) == getattr(owner, "dtype", None) == getattr(twin, "dtype", None)
    assert owner.totals.dtype == twin.totals.dtype
    assert torch.equal(owner.totals, twin.totals)
    assert value(view) == value(twin) == close(expected(EARLY))


def compute_on_the_first_rank(rank: int, of_view: bool) -> float:
    """A view's value where only the first rank asks, and asks for its own rows."""
    metric = GlobalLoss(["a"])
    view = metric.scalar("loss")
    (view if of_view else metric).sync_on_compute = False
    metric.update(torch.tensor([1.0 + rank]), 1.0)
    return view.compute().item() if rank == 0 else 0.0


@pytest.mark.parametrize("of_view", [True, False])
def test_a_view_of_one_rank_alone_waits_for_no_other(two_ranks: RankPool, of_view: bool) -> None:
    assert two_ranks.run(compute_on_the_first_rank, of_view) == [1.0, 0.0]
