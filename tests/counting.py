"""What a piece of code asks of the device and of the network, counted where torch dispatches it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Collect(TorchDispatchMode):
    """Runs every operator, and keeps the names of those that are wanted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def wants(self, func: Any) -> bool:
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.wants(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class CountKernels(_Collect):
    """Collects the names of the operators that do work: all but views and detach."""

    def wants(self, func: Any) -> bool:
        """Whether it does work."""
        return not func.is_view and func is not torch.ops.aten.detach.default


class CountCollectives(_Collect):
    """Collects the names of the collectives, those that DDP's reducer or torchmetrics start among them."""

    def wants(self, func: Any) -> bool:
        """Whether it is a collective."""
        return func.namespace in ("c10d", "_c10d_functional")
