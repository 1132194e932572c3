"""Running sums in a checkpoint: one tensor of bytes a metric, which says what the sums are of and of which ranks.

Float64 sums come in, bytes go out, which ``torch.load(weights_only=True)`` reads, no cast of a checkpoint rounds, and
``safetensors`` holds; and back, after checks.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from twloss._arguments import list_some
from twloss._torch import crc32_of, hidden_from_jit, plain_tensors, tensor_of

ALL_RANKS = (0, 1)
"""The place of sums of all ranks: that of a process without others."""
ANY = "*"
"""The name that stands, in a description, for all that nobody knows of its sums, which are then of any."""
_CHECKSUM, _HEAD = 8, 4 * 8  # bytes: of the checksum, and of all before the sums


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
    """Raise a ValueError that names the first difference between two descriptions, names that one lacks included."""
    expected = json.loads(json.dumps(expected))  # with lists for tuples, as in what was found
    # The shape last: it follows from the tasks, windows and segments, which say more.
    for name in sorted({**expected, **found}, key=lambda name: name == "shape"):
        if name == ANY or any(ANY in each and name not in each for each in (found, expected)):
            continue
        pair = [{name: each[name]} if name in each else {} for each in (found, expected)]
        if pair[0] != pair[1] and json.dumps(pair[0]) != json.dumps(pair[1]):  # two NaNs differ, and their texts do not
            shown = [_show(name, each) for each in pair]
            # A GlobalLoss without a rule may lack the entry "segments"; then only the shapes differ.
            reason = ", as with as many sums and the same segments" if name == "shape" else ""
            raise ValueError(f"got sums of {shown[0]}, expected {shown[1]}{reason}")


def _show(name: str, values: dict[str, Any]) -> str:
    if name not in values:
        return f"no {name}"
    value = values[name]
    return f"{name}={list_some(value, 12) if isinstance(value, (list, dict)) else repr(value)}"


def sums_to_bytes(sums: Tensor, description: dict[str, Any], place: tuple[int, int]) -> Tensor:
    """An entry ``(bytes,)`` uint8 on the CPU, of a length that only the shape and the description decide.

    Its parts are, in this order: the CRC-32 of all the others, the number of sums, the rank that they are of and the
    number of ranks, an int64 each; the sums, float64; the description, a JSON text.

    Args:
        sums: float64, of the description's shape.
        description: what the sums are of.
        place: the rank that they are of, and the number of ranks.
    """
    head = tensor_of((sums.numel(), *place), torch.int64, torch.device("cpu"))
    parts = head, sums.detach().cpu().flatten(), encode(description)
    rest = torch.cat([part.view(torch.uint8) for part in parts])
    return torch.cat((_checksum(rest), rest))


def _checksum(rest: Tensor) -> Tensor:
    return tensor_of((crc32_of(rest),), torch.int64, torch.device("cpu")).view(torch.uint8)


def sums_from_bytes(entry: Any, description: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    """The sums of an entry, and their place.

    Args:
        entry: the result of ``sums_to_bytes``.
        description: what they have to be of.

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
    entry = entry.detach().cpu().clone()
    # First of all, so that a damaged description is not taken for that of something else.
    if len(entry) < _HEAD or not torch.equal(entry[:_CHECKSUM], _checksum(entry[_CHECKSUM:])):
        raise ValueError(f"got {len(entry)} bytes that are damaged, or of no sums, expected those of saved sums")
    count, rank, ranks = entry[_CHECKSUM:_HEAD].view(torch.int64).tolist()
    end = _HEAD + 8 * count
    check_same(decode(entry[end:]), description)
    return entry[_HEAD:end].view(torch.float64).view(description["shape"]), (rank, ranks)
