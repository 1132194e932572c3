"""Copies and checkpoints: the sums travel whole, or not at all and with a reason."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tests.support.rank_pool import RankPool
from twloss import GlobalLoss, Loss, MultiTaskLoss

TASKS = ["a", "b"]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def persistent(tasks: list[str] | None = None) -> GlobalLoss:
    metric = GlobalLoss(TASKS if tasks is None else tasks)
    metric.persistent(True)
    return metric


def fed(metric: GlobalLoss, times: int = 1) -> GlobalLoss:
    for step in range(times):
        metric.update(torch.tensor([1 / 3, 2.0 + step]), 3)
    return metric


class Model(nn.Module):
    """A model with a loss whose sums are saved with it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(3, 2)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, pos_weights=[2.0, 3.0])
        for metric in (self.loss.train_metric, self.loss.eval_metric):
            metric.persistent(True)

    def forward(self, features: Tensor) -> Tensor:
        """The global loss."""
        loss: Tensor = self.loss(self.heads(features), features[:, :2].sigmoid())["loss"]
        return loss


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_in_the_middle_of_a_step_goes_on_alone(duplicate: Any) -> None:
    model = Model()
    features = torch.randn(5, 3)
    value = model(features)
    twin = duplicate(model)
    value.backward()
    if duplicate is not copy.copy:
        twin(features)
        assert twin.loss.train_metric.update_count == 2
    assert model.loss.train_metric.update_count == 1
    assert twin(features).item() == pytest.approx(value.item(), rel=1e-6)


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped() -> None:
    batches = [torch.randn(7, 3) for _ in range(6)]
    steady, stopped = Model(), Model()
    stopped.load_state_dict(steady.state_dict())
    for features in batches[:3]:
        steady(features)
        stopped(features)
    resumed = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved_and_loaded(stopped.state_dict()))
        resumed.loss.train_metric.compute()
    for features in batches[3:]:
        steady(features)
        resumed(features)
    assert torch.equal(steady.loss.train_metric.totals, resumed.loss.train_metric.totals)
    ours, theirs = resumed.loss.train_metric.compute(), steady.loss.train_metric.compute()
    assert {key: value.item() for key, value in ours.items()} == {key: value.item() for key, value in theirs.items()}


def test_a_load_is_seen_by_the_next_compute() -> None:
    metric, other = fed(persistent()), fed(persistent(), 3)
    metric.compute()
    metric.load_state_dict(other.state_dict())
    assert metric.compute()["loss"].item() == other.compute()["loss"].item()
    assert metric.update_count == 3


def test_a_checkpoint_and_the_sums_share_no_memory() -> None:
    metric = fed(persistent())
    state = metric.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    fed(metric)
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    for assign in (False, True):
        fresh = persistent()
        fresh.load_state_dict(state, assign=assign)
        fed(fresh)
        assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_a_load_into_a_model_on_the_meta_device_brings_it_here() -> None:
    state = fed(persistent()).state_dict()
    with torch.device("meta"):
        metric = persistent()
    metric.load_state_dict(state, assign=True)
    assert fed(metric).update_count == 2


WRONG: dict[str, tuple[Any, str]] = {
    "other tasks": (fed(persistent(["a", "c"])).state_dict(), "'c'"),
    "other order": (fed(persistent(["b", "a"])).state_dict(), "'b', 'a'"),
    "fewer tasks": (fed(persistent()).state_dict() | {"totals": torch.ones(4, 1, dtype=torch.float64)}, "shape"),
    "dtype": (fed(persistent()).state_dict() | {"totals": torch.ones(4, 2)}, "float32"),
    "meta": (fed(persistent()).state_dict() | {"totals": torch.ones(4, 2, device="meta")}, "meta"),
    "no tensor": (fed(persistent()).state_dict() | {"totals": [1.0]}, "list"),
    "sums of nothing": ({"totals": torch.ones(4, 2, dtype=torch.float64)}, "sums_of"),
    "nothing": ({}, "totals"),
    "a text of something else": (
        fed(persistent()).state_dict() | {"sums_of": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
        "sums_of",
    ),
    "no text": (fed(persistent()).state_dict() | {"sums_of": torch.tensor([255, 254], dtype=torch.uint8)}, "sums_of"),
}


@pytest.mark.parametrize(("state", "message"), WRONG.values(), ids=WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    metric = fed(persistent())
    before = metric.totals.clone()
    with pytest.raises(RuntimeError, match=message):
        metric.load_state_dict(state)
    assert torch.equal(metric.totals, before)


def test_without_persistent_nothing_is_saved_and_a_plain_checkpoint_loads() -> None:
    loss = Loss("bce_with_logits")
    loss(torch.zeros(3), torch.ones(3))
    assert loss.state_dict() == {}
    Loss("bce_with_logits").load_state_dict({})
    assert loss.train_metric.update_count == 1


def test_sums_of_other_tasks_are_not_merged() -> None:
    with pytest.raises(ValueError, match="incoming_state"):
        persistent().merge_state(persistent(["c", "d"]))
    metric = fed(persistent())
    metric.merge_state(fed(persistent()).metric_state)
    assert metric.update_count == 2


# On ranks.


def copies_with_a_group(rank: int) -> list[Any]:
    group = dist.new_group([0, 1])
    loss = MultiTaskLoss("bce_with_logits", TASKS, global_batch=True, process_group=group)
    loss(torch.zeros(2, 2), torch.ones(2, 2))
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    same = [
        twin.process_group is group and twin.train_metric.process_group is group and twin.train_metric.update_called
        for twin in twins
    ]
    sums = [twin.train_metric.compute()["loss"].item() for twin in twins]
    return [same, sums, pickle.dumps(loss)]


def test_copies_keep_the_process_group(two_ranks: RankPool) -> None:
    for same, sums, pickled in two_ranks.run(copies_with_a_group):
        assert same == [True, True]
        assert sums[0] == sums[1]
        with pytest.warns(UserWarning, match="process_group"):
            elsewhere = pickle.loads(pickled)
        assert elsewhere.process_group is None
        assert elsewhere.train_metric.update_count == 1


def save_on_each_rank(rank: int, synced: bool) -> tuple[dict[str, Any], float]:
    """Each rank's state dict, the second time while synced, and the loss over ranks."""
    metric = fed(persistent(), rank + 1)
    if synced:
        metric.sync()
    state = saved_and_loaded(metric.state_dict())
    if synced:
        metric.unsync()
    return state, metric.compute()["loss"].item()


def load_on_each_rank(rank: int, states: list[dict[str, Any]]) -> tuple[float, str]:
    """The loss over ranks after each rank's own state, and what rank 0's on all of them raises."""
    metric = persistent()
    metric.load_state_dict(states[rank])
    message = ""
    try:
        persistent().load_state_dict(states[0])
    except RuntimeError as error:
        message = str(error)
    return metric.compute()["loss"].item(), message


@pytest.mark.parametrize("synced", [False, True])
def test_each_ranks_own_state_is_exact_and_rank_0s_for_all_is_refused(ranks: RankPool, synced: bool) -> None:
    answers = ranks.run(save_on_each_rank, synced)
    states, values = [state for state, _ in answers], [value for _, value in answers]
    for rank, (value, message) in enumerate(ranks.run(load_on_each_rank, states)):
        assert value == values[0]
        assert ("'rank': 0" in message) == (rank > 0)
    with pytest.raises(RuntimeError, match=r"'ranks'"):
        persistent().load_state_dict(states[0])


def load_sums_of_another_rank(rank: int, state: dict[str, Any]) -> int:
    metric = fed(persistent())
    metric.load_state_dict(state)
    return metric.update_count


def test_sums_of_0_suit_every_rank(two_ranks: RankPool) -> None:
    """So does a checkpoint that is written after a reset(), whoever wrote it."""
    assert two_ranks.run(load_sums_of_another_rank, persistent().state_dict()) == [0, 0]


def through_a_distributed_checkpoint(rank: int, directory: str) -> bool:
    """A distributed checkpoint keeps one tensor a name, so each rank's sums go under a name of its own."""
    warnings.simplefilter("ignore")
    metric = fed(persistent(), rank + 1)
    save({f"rank{rank}": metric.state_dict()}, checkpoint_id=directory)
    fresh = persistent()
    state = {f"rank{rank}": fresh.state_dict()}
    load(state, checkpoint_id=directory)
    fresh.load_state_dict(state[f"rank{rank}"])
    warnings.simplefilter("error")
    return torch.equal(fresh.totals, metric.totals)


def test_a_distributed_checkpoint_keeps_each_ranks_sums(two_ranks: RankPool, tmp_path: Any) -> None:
    assert two_ranks.run(through_a_distributed_checkpoint, str(tmp_path)) == [True, True]
