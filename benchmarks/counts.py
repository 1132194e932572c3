"""What a step asks of the device and of the network, counted where torch dispatches it, and its peak of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.paired import Step

__all__ = ["CollectiveLog", "KernelLog", "count_kernels", "count_launches", "peak_bytes"]


class KernelLog(TorchDispatchMode):
    """Notes the operators that do work: all but views and detach."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class CollectiveLog(TorchDispatchMode):
    """Notes the collectives, those that DDP's reducer or torchmetrics start among them, and the bytes each is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(str(func))
            tensors = [value for value in args[0] if isinstance(value, torch.Tensor)] if args else []
            self.bytes.append(sum(value.numel() * value.element_size() for value in tensors))
        return func(*args, **(kwargs or {}))


def count_kernels(step: Step) -> int:
    """The operators of a step that do work, in forward and backward."""
    with KernelLog() as log:
        step()
    return len(log.names)


def count_launches(step: Step) -> int:
    """The kernels that a step launches on the GPU, copies and fills included."""
    step()
    torch.cuda.synchronize()
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or [])


def peak_bytes(step: Step, device: torch.device) -> int:
    """The greatest number of bytes that a step holds at once beyond what was there before it."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return int(max(accumulate((change for _, change in changes), initial=0)))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Send standard error nowhere: torch 2.13's profiler writes two lines to it at every use, at every log level."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
