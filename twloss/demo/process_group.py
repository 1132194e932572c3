"""The ranks, where torchrun started some, and what each of them takes of the rows.

A kind of device comes in, this rank's own device goes out; and from rows that all ranks hold, this rank's share.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from twloss.demo.movielens import Rows

__all__ = ["process_group", "rank_and_world_size", "share"]


@contextmanager
def process_group(kind: str) -> Iterator[torch.device]:
    """Join the ranks that torchrun started, and leave them at the end; without torchrun there is nothing to join."""
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if not dist.is_torchelastic_launched():
        yield device
        return
    if kind == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        # A collector's run, because DDP is in reference cycles: gloo aborts a process that ends with a group in use.
        gc.collect()
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """This rank's number and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(rows: Rows) -> Rows:
    """This rank's part of rows that all ranks hold: each row goes to one rank, and a rank may get none."""
    rank, world_size = rank_and_world_size()
    return rows[rank::world_size]
