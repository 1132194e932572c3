"""examples/fused_linear_ce.py, on one process and on two: chunks have the loss and gradients of all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from examples import fused_linear_ce as example
from tests.support.launch import script
from tests.support.rank_pool import on_one_or_two
from twloss import Loss

TOKENS, WIDTH, CLASSES = 23, 5, 7
STEPS = [slice(0, 14), slice(14, 23)]
PARAMETERS = ["embed.weight", "head.weight"]


def tokens_and_weight() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``(tokens, width)``, the head's weight and labels, of which the second half has few."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (TOKENS,), generator=generator)
    labels[[1, 7, *range(9, 13), *range(16, TOKENS)]] = example.PADDING
    return hidden, weight, labels


def both_steps_on_rank(rank: int, chunk: int) -> dict[str, Any]:
    """Each step's loss and gradients, of which DDP would average the weight's; then the loss that is tracked."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    loss = Loss("given", global_batch=True)
    hidden, weight, labels = tokens_and_weight()
    found: dict[str, Any] = {"losses": [], "by_weight": [], "by_hidden": [], "counts": []}
    for rows in STEPS:
        # Uneven, and of the second step the last rank has no label.
        mine = slice(rows.start, rows.start + 9) if rank == 0 else slice(rows.start + 9, rows.stop)
        x, y = hidden[rows if world_size == 1 else mine], labels[rows if world_size == 1 else mine]
        x, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss_sum, count = example.sum_in_chunks(x, w, y, chunk)
        value = loss.from_sums(loss_sum, count)
        value.backward()
        assert x.grad is not None
        assert w.grad is not None
        found["losses"].append(value.item())
        found["counts"].append(int(count))
        found["by_weight"].append((w.grad / world_size).tolist())
        found["by_hidden"].append((x.grad / world_size).tolist())
    return {**found, "tracked": loss.compute()["loss"].item()}


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def both_steps(request: pytest.FixtureRequest) -> Callable[[int], list[dict[str, Any]]]:
    return on_one_or_two(request, both_steps_on_rank)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_sums_of_chunks_have_the_loss_and_gradients_of_plain_cross_entropy(
    both_steps: Callable[[int], list[dict[str, Any]]], chunk: int
) -> None:
    found = both_steps(chunk)
    hidden, weight, labels = tokens_and_weight()
    for n, rows in enumerate(STEPS):
        x, w = hidden[rows].requires_grad_(), weight.clone().requires_grad_()
        exact = F.cross_entropy(x @ w.T, labels[rows], ignore_index=example.PADDING)
        by_hidden, by_weight = torch.autograd.grad(exact, [x, w])
        assert [each["losses"][n] for each in found] == pytest.approx([exact.item()] * len(found), rel=1e-12)
        summed = torch.tensor([each["by_weight"][n] for each in found], dtype=torch.float64).sum(0)
        torch.testing.assert_close(summed, by_weight, rtol=1e-12, atol=1e-15)
        parts = torch.cat([torch.tensor(each["by_hidden"][n], dtype=torch.float64).view(-1, WIDTH) for each in found])
        torch.testing.assert_close(parts, by_hidden, rtol=1e-12, atol=1e-15)


def test_the_tracked_loss_is_that_of_all_labels_of_all_steps_and_ranks(
    both_steps: Callable[[int], list[dict[str, Any]]],
) -> None:
    found = both_steps(4)
    hidden, weight, labels = tokens_and_weight()
    exact = F.cross_entropy(hidden @ weight.T, labels, ignore_index=example.PADDING).item()
    assert [each["tracked"] for each in found] == pytest.approx([exact] * len(found), rel=1e-12)
    counts = [each["counts"] for each in found]
    if len(counts) == 2:
        assert counts == [[7, 2], [1, 0]]


def train_with_plain_cross_entropy() -> tuple[float, dict[str, Tensor]]:
    """The loss of all steps and the trained parameters, in one process, by torch alone."""
    torch.manual_seed(0)
    model = example.LanguageModel(in_chunks=False)
    embed, head = (parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    summed, count = 0.0, 0
    for _ in range(example.EPOCHS):
        for tokens, labels in example.batches():
            logits = embed[tokens.flatten()].tanh() @ head.T
            losses = F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=example.PADDING)
            valid = int((labels != example.PADDING).sum())
            gradients = torch.autograd.grad(losses.sum() / valid, [embed, head])
            with torch.no_grad():
                for parameter, gradient in zip((embed, head), gradients):
                    parameter.sub_(gradient, alpha=example.LEARNING_RATE)
            summed, count = summed + losses.sum().item(), count + valid
    return summed / count, dict(zip(PARAMETERS, (embed.detach(), head.detach())))


@pytest.fixture(scope="module")
def truth() -> tuple[float, dict[str, Tensor]]:
    return train_with_plain_cross_entropy()


def run_on_rank(rank: int) -> tuple[dict[str, float], dict[str, list[Any]], list[int]]:
    """What the example prints, the parameters that it trains in chunks, and this rank's tokens by batch."""
    model = example.train(in_chunks=True)
    trained = {name: values.tolist() for name, values in model.named_parameters()}
    return example.main(), trained, [tokens.numel() for tokens, _ in example.shares()]


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Callable[[], list[Any]]:
    """Runs the example; each rank's results."""
    return on_one_or_two(request, run_on_rank)


def test_the_example_trains_as_plain_cross_entropy_does(
    run: Callable[[], list[Any]], truth: tuple[float, dict[str, Tensor]]
) -> None:
    loss, parameters = truth
    for results, trained, _ in run():
        assert results["loss, plain"] == pytest.approx(loss, rel=1e-12)
        assert results["loss, in chunks"] == pytest.approx(loss, rel=1e-12)
        assert [*trained] == PARAMETERS
        for name, values in parameters.items():
            torch.testing.assert_close(torch.tensor(trained[name], dtype=torch.float64), values, rtol=1e-11, atol=1e-14)


def test_chunks_take_less_memory_than_the_logits(run: Callable[[], list[Any]]) -> None:
    """The plain form holds the logits, their logarithmic softmax and a gradient at least."""
    for results, _, tokens in run():
        logits = max(tokens) * example.VOCABULARY * 8 / 1e6
        assert results["peak MB, plain"] > 2 * logits
        assert results["peak MB, in chunks"] < logits


@pytest.mark.parametrize("chunk", [8, 32])
def test_the_memory_of_chunks_does_not_grow_with_the_tokens(chunk: int) -> None:
    """Eight times the tokens take less than one chunk's logits more: hidden states, and graphs of chunks."""

    def peak(tokens: int) -> int:
        hidden = torch.randn(tokens, example.WIDTH, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(example.VOCABULARY, example.WIDTH, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(example.VOCABULARY, (tokens,))

        def step() -> None:
            example.sum_in_chunks(hidden, weight, labels, chunk)[0].backward()

        return example.peak_bytes(step)

    assert peak(16 * chunk) - peak(2 * chunk) < chunk * example.VOCABULARY * 8


def test_the_peak_is_what_is_held_at_once() -> None:
    """Two tensors of 8 kB, one after the other, and then both."""
    one = example.peak_bytes(lambda: [torch.zeros(1000, dtype=torch.float64) is None for _ in range(2)])
    both = example.peak_bytes(lambda: [torch.zeros(1000, dtype=torch.float64) for _ in range(2)])
    assert (one, both) == (8000, 16000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [1, 2])
def test_as_a_script(world_size: int, truth: tuple[float, dict[str, Tensor]]) -> None:
    printed = script(world_size, example.__file__)
    assert printed["loss, plain"] == pytest.approx(truth[0], abs=1e-6)
    assert printed["loss, in chunks"] == pytest.approx(truth[0], abs=1e-6)
    assert printed["peak MB, in chunks"] < printed["peak MB, plain"] / 3
