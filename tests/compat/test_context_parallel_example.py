"""examples/context_parallel.py on four ranks: parts of sequences give the loss and the weights of one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from examples import context_parallel as example
from tests.support.launch import script
from tests.support.rank_pool import RankPool

Weights = dict[str, list[float]]


def train_on_rank(rank: int) -> tuple[float, Weights, list[int]]:
    """The loss of all steps, the trained weights, and how many labels this rank has in each batch of an epoch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model, loss = example.train(mesh)
    labels = [example.part(batch, mesh)[1] for batch in example.batches()]
    counts = [int((each != example.PADDING).sum()) for each in labels]
    return loss.train_metric.compute()["loss"].item(), weights_of(model), counts


def weights_of(model: nn.Module) -> Weights:
    return {name: values.flatten().tolist() for name, values in model.named_parameters()}


def logits_of(model: example.Decoder, tokens: Tensor) -> Tensor:
    """Those of one sequence ``(positions, classes)``, position by position: no mask, no padding."""
    query, key, value = model.attend(model.embed(tokens)).chunk(3, -1)
    scores = [key[: n + 1] @ query[n] / math.sqrt(example.WIDTH) for n in range(len(tokens))]
    hidden = torch.stack([each.softmax(0) @ value[: len(each)] for each in scores])
    logits: Tensor = model.head(hidden)
    return logits


def train_by_hand() -> tuple[float, Weights]:
    """The same of whole sequences, one after the other, with the mean over all positions that have a label."""
    torch.manual_seed(0)
    model = example.Decoder()
    summed, count = 0.0, 0
    for _ in range(example.EPOCHS):
        for tokens, labels in example.batches():
            lengths = (labels != example.PADDING).sum(1).tolist()
            logits = torch.cat([logits_of(model, x[:length]) for x, length in zip(tokens, lengths)])
            losses = F.cross_entropy(logits, labels[labels != example.PADDING], reduction="none")
            gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients):
                    parameter.sub_(gradient, alpha=example.LEARNING_RATE)
            summed, count = summed + losses.sum().item(), count + len(losses)
    return summed / count, weights_of(model)


def test_parts_of_sequences_train_as_one_process_does(four_ranks: RankPool) -> None:
    loss, weights = train_by_hand()
    found = four_ranks.run(train_on_rank)
    for rank_loss, rank_weights, _ in found:
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        assert rank_weights.keys() == weights.keys()
        for name, values in weights.items():
            assert rank_weights[name] == pytest.approx(values, rel=1e-12, abs=1e-14), name


def test_the_parts_are_uneven_and_some_have_no_label(four_ranks: RankPool) -> None:
    """And so a mean of the ranks' means would be another number."""
    counts = [counts for *_, counts in four_ranks.run(train_on_rank)]
    assert all(len(set(of_batch)) > 1 for of_batch in zip(*counts))
    assert any(0 in of_rank for of_rank in counts)


def test_the_example_finds_no_difference(four_ranks: RankPool) -> None:
    loss, _ = train_by_hand()
    for results in four_ranks.run(run_on_rank):
        assert results["loss"] == pytest.approx(loss, rel=1e-12)
        assert results["difference"] < 1e-13


def run_on_rank(rank: int) -> dict[str, float]:
    return example.main()


@pytest.mark.exhaustive
def test_as_a_script() -> None:
    printed = script(4, example.__file__)
    assert printed["loss"] == pytest.approx(train_by_hand()[0], rel=1e-5)
    assert printed["difference"] < 1e-13
