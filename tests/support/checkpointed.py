"""The ways in which activation checkpointing may wrap a model, so that its forward runs again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Block = Callable[..., Tensor]


def once(model: Block, reentrant: bool) -> Block:
    """One checkpointed block."""
    return functools.partial(checkpoint, model, use_reentrant=reentrant)


def nested(model: Block, reentrant: bool) -> Block:
    """A checkpointed block inside of another."""
    return once(lambda *inputs: once(model, reentrant)(*inputs) * 2, reentrant)


def compiled_inside(model: Block, reentrant: bool) -> Block:
    """A compiled model in a checkpointed block."""
    return once(torch.compile(model, fullgraph=True, backend="aot_eager"), reentrant)


def compiled_outside(model: Block, reentrant: bool) -> Block:
    """A checkpointed block that is compiled."""
    return torch.compile(once(model, reentrant), backend="aot_eager")


WRAPS = (once, nested, compiled_inside, compiled_outside)
