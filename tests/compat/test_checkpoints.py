"""Checkpoints as torch's distributed ones, Lightning and Accelerate save and load them, on other numbers of ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from tests.support import reference
from tests.support.launch import as_if_from_torchrun
from tests.support.rank_pool import RankPool
from tests.support.results import numbers
from twloss import MultiTaskLoss, global_sums
from twloss._sums.ranks import place_in

TASKS = ["a", "b"]
ROWS = 23
Numbers = dict[str, float]


class Ranker(nn.Module):
    """A linear ranker whose training sums are saved, and whose losses are sums, so that each row that counts shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(3, 2, dtype=torch.float64)
        self.loss = MultiTaskLoss("bce_with_logits", TASKS, "sum", "sum", global_batch=True)
        self.loss.train_metric.persistent(True)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The global loss."""
        loss: Tensor = self.loss(self.heads(features), labels)["loss"]
        return loss


def rows() -> tuple[Tensor, Tensor]:
    """Features and labels."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(ROWS, 3, dtype=torch.float64, generator=generator)
    return features, (features[:, :2] > 0).double()


def expected(passes: int) -> Numbers:
    """The sums of the losses over so many passes over the rows, by hand."""
    features, labels = rows()
    heads = Ranker().heads
    weight, bias = heads.weight.tolist(), heads.bias.tolist()
    sums = {}
    for t, task in enumerate(TASKS):
        logits = [sum(x * w for x, w in zip(row, weight[t])) + bias[t] for row in features.tolist()]
        losses = [reference.bce_with_logits(x, y) for x, y in zip(logits, labels[:, t].tolist())]
        sums[f"loss/{task}"] = passes * sum(losses)
    return {**sums, "loss": sum(sums.values())}


def part(values: Tensor) -> Tensor:
    """This rank's rows of values that all ranks have."""
    rank, world_size = place_in(None)
    return values[rank::world_size]


def on(pool: RankPool | None, function: Any, *arguments: Any) -> list[Any]:
    """What a function gives on each rank, or in this process."""
    return [function(0, *arguments)] if pool is None else pool.run(function, *arguments)


@pytest.fixture(params=[1, 2, 3], ids=["to one", "to two", "to three"])
def others(request: pytest.FixtureRequest) -> RankPool | None:
    """The ranks that go on."""
    names = {2: "two_ranks", 3: "three_ranks"}
    return request.getfixturevalue(names[request.param]) if request.param in names else None


# torch's distributed checkpoints.


def wrapped(how: str) -> tuple[nn.Module, Ranker]:
    """A ranker as it is, or within what trains it on several ranks."""
    ranker = Ranker()
    if how == "DDP" and dist.is_initialized():
        return DistributedDataParallel(ranker), ranker
    if how == "FSDP2" and dist.is_initialized():
        fully_shard(ranker)
    return ranker, ranker


def save_distributed(rank: int, how: str, directory: str) -> dict[str, Any]:
    """A distributed checkpoint, and the whole state_dict, which the first rank gets."""
    model, _ = wrapped(how)
    model(*map(part, rows()))
    with warnings.catch_warnings(), global_sums(model):
        warnings.simplefilter("ignore")  # torch's own, of itself
        save(get_model_state_dict(model), checkpoint_id=directory)
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_distributed(rank: int, how: str, directory: str, whole: dict[str, Any]) -> list[Numbers]:
    """The losses of the saved rows and of one more pass over them, by three ways to load."""
    options: list[Any] = [None, StateDictOptions(full_state_dict=True)]
    if dist.is_initialized():
        options.append(StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of itself
        for option in options:
            model, ranker = wrapped(how)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            if option is None:
                state = get_model_state_dict(model)
                load(state, checkpoint_id=directory)
            else:
                state = dict(whole) if rank == 0 or not option.broadcast_from_rank0 else {}
            set_model_state_dict(model, state, options=option)
            results.append(numbers(ranker.loss.train_metric.compute()))
            model(*map(part, rows()))
            results.append(numbers(ranker.loss.train_metric.compute()))
    return results


@pytest.mark.parametrize("how", ["plain", "DDP", "FSDP2"])
def test_a_distributed_checkpoint_of_two_ranks_goes_on(
    two_ranks: RankPool, others: RankPool | None, how: str, tmp_path: Path
) -> None:
    whole = two_ranks.run(save_distributed, how, str(tmp_path))[0]
    for results in on(others, load_distributed, how, str(tmp_path), whole):
        assert len(results) == (4 if others is None else 6)
        for number, found in enumerate(results):
            assert found == pytest.approx(expected(1 + number % 2), rel=1e-12)


def mix_ranks(rank: int, directory: str) -> tuple[str, int]:
    """What the load of a checkpoint raises that was saved without global_sums(), and the updates after it."""
    saved, loaded = Ranker(), Ranker()
    saved(*map(part, rows()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of itself
        save(get_model_state_dict(saved), checkpoint_id=directory)
        state = get_model_state_dict(loaded)
        load(state, checkpoint_id=directory)
    try:
        set_model_state_dict(loaded, state)
    except RuntimeError as error:
        return str(error), loaded.loss.train_metric.update_count
    return "", loaded.loss.train_metric.update_count


def test_no_rank_takes_the_sums_of_another(two_ranks: RankPool, tmp_path: Path) -> None:
    """A distributed checkpoint has those of one rank, whichever it is."""
    answers = two_ranks.run(mix_ranks, str(tmp_path))
    assert sorted(bool(message) for message, _ in answers) == [False, True]
    for message, updates in answers:
        assert updates == (0 if message else 1)
        assert not message or "global_sums" in message


# Lightning.


class Module(lightning.LightningModule):
    """The ranker, trained with a learning rate of 0; saved as the guide has it."""

    def __init__(self) -> None:
        super().__init__()
        self.ranker = Ranker()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The state_dict with the sums of all ranks."""
        with global_sums(self):
            checkpoint["state_dict"] = self.state_dict()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss."""
        loss: Tensor = self.ranker(*batch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Which leaves the ranker as it is."""
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's rows, in batches of unequal size."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(Subset(TensorDataset(*rows()), range(rank, ROWS, world_size)), batch_size=5)


def fit(rank: int, epochs: int, resume: str | None, path: str) -> Numbers:
    """Train up to so many epochs, and save."""
    model, (_, world_size) = Module(), place_in(None)
    with warnings.catch_warnings(), as_if_from_torchrun():
        warnings.simplefilter("ignore")  # Lightning's own, of a run as short as this
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy="ddp" if world_size > 1 else "auto",
            use_distributed_sampler=False,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, ckpt_path=resume)
        trainer.save_checkpoint(path)
    return numbers(model.ranker.loss.train_metric.compute())


def test_lightning_resumes_on_as_many_ranks_and_on_others(
    two_ranks: RankPool, others: RankPool | None, tmp_path: Path
) -> None:
    first, second, third = (str(tmp_path / name) for name in ("first.ckpt", "second.ckpt", "third.ckpt"))
    assert two_ranks.run(fit, 1, None, first)[1] == pytest.approx(expected(1), rel=1e-12)
    for found in on(others, fit, 2, first, second):
        assert found == pytest.approx(expected(2), rel=1e-12)
    for found in two_ranks.run(fit, 3, second, third):
        assert found == pytest.approx(expected(3), rel=1e-12)


# Accelerate.


def accelerate(rank: int, resume: str | None, path: str) -> Numbers:
    """Load, take the rows once, and save."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with warnings.catch_warnings(), as_if_from_torchrun():
        warnings.simplefilter("ignore")  # Accelerate's own
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(Ranker())
        if resume is not None:
            accelerator.load_state(resume)
        model(*map(part, rows()))
        with global_sums(model):
            accelerator.save_state(path)
    return numbers(accelerator.unwrap_model(model).loss.train_metric.compute())


def test_accelerate_resumes_on_as_many_ranks_and_on_others(
    two_ranks: RankPool, others: RankPool | None, tmp_path: Path
) -> None:
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    assert two_ranks.run(accelerate, None, first)[1] == pytest.approx(expected(1), rel=1e-12)
    for found in on(others, accelerate, first, second):
        assert found == pytest.approx(expected(2), rel=1e-12)
    for found in two_ranks.run(accelerate, second, third):
        assert found == pytest.approx(expected(3), rel=1e-12)
