"""Running sums in a checkpoint: one tensor of bytes a metric, which says what the sums are of and of which ranks.

Float64 sums come in, bytes go out, which ``torch.load(weights_only=True)`` reads, no cast of a checkpoint rounds, and
``safetensors`` holds; and back, after checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from twloss._arguments import list_some
from twloss._sums.running_sums import SumsFormat
from twloss._torch import hidden_from_jit, plain_tensors, tensor_of

ALL_RANKS = (0, 1)
"""The place of sums of all ranks: that of a process without others."""
_HEAD = 3  # numbers before the sums: how many these are, and the place of the rank that they are of


@contextmanager
def global_sums(module: nn.Module) -> Generator[None, None, None]:
    """A context in which the ``state_dict()`` of a module has the sums of all ranks, and so suits any number of them.

    Each metric in the module on which ``persistent(True)`` was called computes a copy of its sums over the ranks, by
    one collective, so that every rank has to enter. A ``state_dict()`` that is made inside, on one rank or on all, has
    the copy. The sums themselves stay as they are, and updates inside of it count.

    A file that was saved so is loaded on all ranks, or on the first alone, of as many as there are then, before or
    after a process group exists: its rows count once. Saved outside, the sums are those of one rank, and are refused on
    any other; those of one process are of all there are.

    Args:
        module: the model, or anything else that has the metrics in it.

    Raises:
        TypeError: for anything but a module.
        ValueError: for a module without such a metric.
        RuntimeError: what ``compute()`` raises where ranks differ, or one does not enter.

    Examples:
        >>> from twloss import MultiTaskLoss, global_sums
        >>> loss = MultiTaskLoss("bce_with_logits", ["like", "reply"])
        >>> loss.train_metric.persistent(True)
        >>> with global_sums(loss):
        ...     state = loss.state_dict()
        >>> list(state)
        ['train_metric.sums._extra_state']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected an nn.Module")
    saved = [each for each in module.modules() if isinstance(each, SavedSums)]
    if not saved:
        raise ValueError("module: got one that saves no sums, expected a metric in it with persistent(True)")
    before = [each.copied for each in saved]
    try:
        for each in saved:
            each.copied = each.owner._save_sums(of_all_ranks=True)
        yield
    finally:
        for each, copied in zip(saved, before):
            each.copied = copied


class HasSums(Protocol):
    """A metric that makes an entry of its sums, and takes one."""

    def _save_sums(self, *, of_all_ranks: bool) -> Tensor: ...

    def _load_sums(self, entry: Any) -> None: ...


@hidden_from_jit
class SavedSums(nn.Module):
    """A metric's entry in a state_dict: the extra state of a child, as torch's distributed checkpoints know no other.

    Args:
        owner: the metric, which has this as a submodule; here it is none.
    """

    owner: HasSums
    copied: Tensor | None
    """The entry of all ranks, within global_sums()."""

    def __init__(self, owner: HasSums) -> None:
        super().__init__()
        self.__dict__.update(owner=owner, copied=None)

    def get_extra_state(self) -> Tensor:
        """The sums, as bytes."""
        return self.owner._save_sums(of_all_ranks=False) if self.copied is None else self.copied.clone()

    def set_extra_state(self, state: Any) -> None:
        """Load them; a TypeError or ValueError for what is none of this metric's, or another rank's."""
        self.owner._load_sums(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except (TypeError, ValueError) as error:
            error_msgs: list[str] = args[-1]
            error_msgs.append(f"{prefix}_extra_state: {error}")


def encode(description: Mapping[str, Any]) -> Tensor:
    """A description of sums as a JSON text, ``(bytes,)`` uint8 on the CPU."""
    with plain_tensors():
        return tensor_of(list(json.dumps(description).encode()), torch.uint8, torch.device("cpu"))


def decode(text: Tensor) -> dict[str, Any]:
    """The description that ``encode`` was given, with lists for tuples.

    Raises:
        ValueError: for any other tensor.
    """
    try:
        description = json.loads(bytes(text.tolist()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "got a sums_of that is no JSON text, expected what metric_state or a checkpoint has"
        ) from error
    if not isinstance(description, dict):
        raise ValueError(f"got a sums_of with {type(description).__name__}, expected a JSON object")
    return description


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a ValueError that names the first difference in what is known of both, their tasks and window at least."""
    for name in ("tasks", "window", *(name for name in expected if name in found)):
        pair = [each.get(name, "unknown") for each in (found, expected)]
        if pair[0] != pair[1]:
            shown = [list_some(value, 12) if isinstance(value, (list, dict)) else repr(value) for value in pair]
            raise ValueError(f"got sums of {name}={shown[0]}, expected {name}={shown[1]}")


def sums_to_bytes(sums: Tensor, description: dict[str, Any], place: tuple[int, int]) -> Tensor:
    """An entry ``(bytes,)`` uint8 on the CPU, of a length that only the shape and the description decide.

    Args:
        sums: float64.
        description: what the sums are of.
        place: the rank that they are of, and the number of ranks.
    """
    head = tensor_of((sums.numel(), *place), torch.float64, torch.device("cpu"))
    numbers = torch.cat((head, sums.detach().cpu().flatten()))
    return torch.cat((numbers.view(torch.uint8), encode({**description, "shape": list(sums.shape)})))


def sums_from_bytes(
    entry: Any, layout: SumsFormat, description: dict[str, Any], *, is_finite: bool
) -> tuple[Tensor, tuple[int, int]]:
    """The sums of an entry, and their place.

    Args:
        entry: the result of ``sums_to_bytes``.
        layout: of the sums.
        description: what they have to be of.
        is_finite: whether they have to be finite.

    Raises:
        TypeError: for anything that can't be an entry.
        ValueError: for a damaged one, or sums of something else.
    """
    if not isinstance(entry, Tensor):
        raise TypeError(f"got {type(entry).__name__}, expected the bytes of saved sums")
    if entry.dtype != torch.uint8 or entry.ndim != 1 or entry.is_meta:
        raise TypeError(
            f"got {entry.dtype} of shape {tuple(entry.shape)} on {entry.device}, expected the bytes of saved sums, of "
            "torch.uint8 and shape (bytes,)"
        )
    damaged = ValueError(f"got {len(entry)} bytes that are damaged, expected those of saved sums")
    entry = entry.detach().cpu().clone()
    start = 8 * _HEAD
    if len(entry) < start:
        raise damaged
    count, rank, ranks = entry[:start].view(torch.float64).tolist()
    if not (0 <= count <= len(entry) / 8 - _HEAD and math.isfinite(rank) and math.isfinite(ranks)):
        raise damaged
    end = start + 8 * int(count)
    check_same(decode(entry[end:]), {**description, "shape": list(layout.shape)})
    if count != math.prod(layout.shape):
        raise damaged
    sums = entry[start:end].view(torch.float64).view(layout.shape)
    if not layout.has_counts(sums):
        raise damaged
    if is_finite and not sums.isfinite().all():
        raise ValueError(
            "got sums that are not finite, expected finite ones: those of nan_strategy='disable' alone may be"
        )
    return sums, (int(rank), int(ranks))
