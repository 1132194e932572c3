"""Numbers of each task, as tensors of any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from twloss._precision import sum_dtype
from twloss._torch import plain_tensors, tensor_of, tile


class TaskConstants:
    """Numbers of each task ``(tasks,)``, as tensors of a device in the dtypes that are computed in; or None.

    They are no registered buffers: with one, DDP would broadcast buffers at every forward. No cast and no meta device
    can harm the Python numbers that the tensors are made of.

    Args:
        numbers: one a task, or None.
        compiled_default: what stands for None in compiled code, where numbers that are set later would have it compiled
            again.
        dtype: of the tensors; None: that which is asked for.
    """

    def __init__(
        self,
        numbers: tuple[float, ...] | None,
        compiled_default: tuple[float, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.numbers = numbers
        self._compiled_default = compiled_default
        self.dtype = dtype
        self.place(torch.get_default_device())

    def place(self, device: torch.device) -> None:
        """Create the tensors on a device ahead of time; creating one inside a compiled forward would recompile it."""
        self._tensors: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        if self.numbers is None and self._compiled_default is None:
            return
        for dtype in {self.dtype or torch.float32, self.dtype or sum_dtype(device)}:
            self._make((device, dtype, 1))

    def set(self, numbers: tuple[float, ...] | None) -> None:
        """Take other numbers, in new tensors: a backward pass may still need those that were."""
        self.numbers = numbers
        for key in list(self._tensors):
            self._make(key)

    def like(self, values: Tensor, repeats: int = 1) -> Tensor | None:
        """The numbers on the device of values, and in their dtype, so many times over."""
        is_compiling = torch.compiler.is_compiling()
        # In this order: compiled code must not depend on whether numbers were set.
        if (self._compiled_default is None or not is_compiling) and self.numbers is None:
            return None
        key = values.device, self.dtype or values.dtype, 1 if is_compiling else repeats
        made = self._tensors[key] if key in self._tensors else self._make(key)
        # Repeated in a graph: a tensor that is kept there would have it compiled again.
        return tile(made, repeats) if is_compiling else made

    def _make(self, key: tuple[torch.device, torch.dtype, int]) -> Tensor:
        """The tensor of a key, to be kept: but not a fake one, of FakeTensorMode or an export, which has no values."""
        device, dtype, repeats = key
        numbers = self._compiled_default if self.numbers is None else self.numbers
        assert numbers is not None
        with plain_tensors():
            if repeats == 1:
                made = tensor_of(numbers, dtype, device)
            else:
                once = device, dtype, 1
                # On the device: numbers from Python would make a GPU's host wait.
                made = tile(self._tensors[once] if once in self._tensors else self._make(once), repeats)
        if type(made) is Tensor:
            self._tensors[key] = made
        else:
            self._tensors.pop(key, None)
        return made
