"""A language model's head whose cross-entropy never has the logits of all tokens.

``python examples/fused_linear_ce.py``, or on two processes
``torchrun --standalone --nproc-per-node=2 examples/fused_linear_ce.py``. It trains with
the logits and without, and prints each way's loss and the memory that a step takes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from twloss import Loss

VOCABULARY, WIDTH, LENGTH, SEQUENCES, BATCH, PADDING = 2000, 16, 64, 9, 4, -100
CHUNK, EPOCHS, LEARNING_RATE = 32, 2, 0.5

Batch = tuple[Tensor, Tensor]


def sum_of_chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Σ loss over these tokens, from logits ``(tokens, classes)``."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits, labels, ignore_index=PADDING, reduction="sum")


def sum_in_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Σ loss and the number of labels, with the logits of one chunk at a time.

    Backward computes the logits of a chunk anew, for one matrix product more.

    Args:
        hidden: ``(tokens, width)``.
        weight: ``(classes, width)``.
        labels: ``(tokens,)``, class indices or PADDING.
        chunk: the number of tokens whose logits are there at once.
    """
    loss_sum = hidden.new_zeros(())
    # Of 0 tokens there is one chunk, of 0: the weight stays in the graph, for DDP.
    for x, y in zip(hidden.split(chunk), labels.split(chunk)):
        part = checkpoint(sum_of_chunk, x, weight, y, use_reentrant=False)
        loss_sum = loss_sum + part
    return loss_sum, (labels != PADDING).sum()


class LanguageModel(nn.Module):
    """The next token from the present one; with its loss, in chunks or plain."""

    def __init__(self, *, in_chunks: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
        self.in_chunks = in_chunks
        if in_chunks:
            self.loss = Loss("given", global_batch=True)
        else:
            self.loss = Loss("cross_entropy", ignore_index=PADDING, global_batch=True)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss of the labels of all ranks."""
        hidden, labels = self.embed(tokens).tanh().flatten(0, 1), labels.flatten()
        if self.in_chunks:
            loss_sum, count = sum_in_chunks(hidden, self.head.weight, labels)
            return self.loss.from_sums(loss_sum, count)
        return self.loss(self.head(hidden), labels)


def batches() -> list[Batch]:
    """Tokens and labels ``(sequences, positions)``, the last batch of one sequence."""
    generator = torch.Generator().manual_seed(1)
    shape = SEQUENCES, LENGTH + 1
    text = torch.randint(VOCABULARY, shape, generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (SEQUENCES, 1), generator=generator)
    is_padding = torch.arange(LENGTH) >= lengths
    labels = text[:, 1:].masked_fill(is_padding, PADDING)
    return [*zip(text[:, :-1].split(BATCH), labels.split(BATCH))]


def shares() -> list[Batch]:
    """This rank's sequences; of the last batch the second of two ranks has none."""
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    return [(x[rank::world_size], y[rank::world_size]) for x, y in batches()]


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes of tensors that a step holds at once, beyond those before it.

    Counted by torch's profiler, which sees each allocation and release on the CPU, also
    inside of operations. On a GPU: ``torch.cuda.max_memory_allocated()``.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held: list[int] = list(accumulate(event.nbytes() for event in events))
    return max(held)


def peak_of_first_step(*, in_chunks: bool) -> int:
    """That of forward and backward of this rank's share of the first batch."""
    model = LanguageModel(in_chunks=in_chunks)
    tokens, labels = shares()[0]
    return peak_bytes(lambda: model(tokens, labels).backward())


def train(*, in_chunks: bool) -> LanguageModel:
    """Train on all ranks; a step is that of one process with the rows of all."""
    torch.manual_seed(0)
    model = LanguageModel(in_chunks=in_chunks)
    module = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for tokens, labels in shares():
            optimizer.zero_grad()
            module(tokens, labels).backward()
            optimizer.step()
    return model


def main() -> dict[str, float]:
    """Train both ways: the loss of all steps and ranks, this rank's peak memory."""
    results = {}
    for name, in_chunks in (("plain", False), ("in chunks", True)):
        model = train(in_chunks=in_chunks)
        results[f"loss, {name}"] = model.loss.compute()["loss"].item()
        results[f"peak MB, {name}"] = peak_of_first_step(in_chunks=in_chunks) / 1e6
    if not dist.is_initialized() or dist.get_rank() == 0:
        for key, value in results.items():
            print(f"{key:<20} {value:.6f}")
    return results


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main()
    if dist.is_initialized():
        # DDP is in reference cycles; gloo aborts a process that ends with it in use.
        gc.collect()
        dist.destroy_process_group()
