"""Data and context parallelism: parts of sequences on each rank, one process's loss.

``torchrun --standalone --nproc-per-node=4 examples/context_parallel.py``. It prints the
loss, and how far the weights are from those that one process gets.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn.parallel import DistributedDataParallel

from twloss import Loss

VOCABULARY, WIDTH, LENGTH, SEQUENCES, BATCH, PADDING = 11, 6, 8, 9, 4, -100
EPOCHS, LEARNING_RATE = 3, 0.5

Batch = tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """Causal attention; with a mesh, each rank has a part of the positions."""

    def __init__(self, cp: DeviceMesh | None = None) -> None:
        super().__init__()
        self.cp = cp
        self.embed = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.attend = nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(sequences, positions, classes)`` of tokens, at these positions."""
        query, memory = self.attend(self.embed(tokens)).split((WIDTH, 2 * WIDTH), -1)
        start = 0
        if self.cp is not None:
            start = self.cp.get_local_rank() * tokens.shape[1]
            # The keys and values of all positions; each rank adds to their gradient.
            memory = DTensor.from_local(memory, self.cp, [Shard(1)])
            memory = memory.full_tensor(grad_placements=[Partial()])
        key, value = memory.chunk(2, -1)
        here, everywhere = torch.arange(tokens.shape[1]), torch.arange(key.shape[1])
        is_past = everywhere <= start + here[:, None]
        hidden = F.scaled_dot_product_attention(query, key, value, attn_mask=is_past)
        logits: Tensor = self.head(hidden)
        return logits


def batches() -> list[Batch]:
    """Tokens and labels ``(sequences, positions)``, the last batch of one sequence.

    A label is the next token: they are moved before a sequence is cut into parts.
    Lengths differ, so that the later parts have fewer labels, or none.
    """
    generator = torch.Generator().manual_seed(1)
    shape = SEQUENCES, LENGTH + 1
    text = torch.randint(VOCABULARY, shape, generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (SEQUENCES, 1), generator=generator)
    is_padding = torch.arange(LENGTH) >= lengths
    labels = text[:, 1:].masked_fill(is_padding, PADDING)
    return [*zip(text[:, :-1].split(BATCH), labels.split(BATCH))]


def part(batch: Batch, mesh: DeviceMesh) -> Batch:
    """This rank's: every second sequence by "dp", half of the positions by "cp"."""
    dp, cp = mesh["dp"], mesh["cp"]
    sequences = slice(dp.get_local_rank(), None, dp.size())
    tokens, labels = (x[sequences].chunk(cp.size(), 1) for x in batch)
    return tokens[cp.get_local_rank()], labels[cp.get_local_rank()]


def train(mesh: DeviceMesh) -> tuple[nn.Module, Loss]:
    """Train on the ranks of a mesh with the dimensions "dp" and "cp"."""
    torch.manual_seed(0)
    # All ranks with different labels; those of a dimension "tp" or "pp" are not.
    ranks = mesh["dp", "cp"]._flatten("dp_cp")
    model = Decoder(mesh["cp"])
    ddp = DistributedDataParallel(model, process_group=ranks.get_group())
    loss = Loss(
        "cross_entropy", ignore_index=PADDING, global_batch=True, process_group=ranks
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for batch in batches():
            tokens, labels = part(batch, mesh)
            optimizer.zero_grad()
            loss(ddp(tokens), labels).backward()
            optimizer.step()
    return model, loss


def train_alone() -> nn.Module:
    """The same in one process, with torch's own loss."""
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for tokens, labels in batches():
            optimizer.zero_grad()
            logits = model(tokens).flatten(0, 1)
            F.cross_entropy(logits, labels.flatten(), ignore_index=PADDING).backward()
            optimizer.step()
    return model


def main() -> dict[str, float]:
    """Train both ways, and compare. Needs a process group of four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model, loss = train(mesh)
    pairs = zip(model.parameters(), train_alone().parameters())
    results = {
        "loss": loss.train_metric.compute()["loss"].item(),
        "difference": max((x - y).abs().max().item() for x, y in pairs),
    }
    if dist.get_rank() == 0:
        for key, value in results.items():
            print(f"{key:<12} {value:.6g}")
    return results


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    # DDP is in reference cycles; gloo aborts a process that ends with it in use.
    gc.collect()
    dist.destroy_process_group()
