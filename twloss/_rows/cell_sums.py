"""The sums of rows by the cells of segments, as many as there are, beside those of all rows.

Values ``(rows, tasks)`` and ids ``(dimensions, rows, 1 or tasks)`` come in; sums ``(cells, tasks)`` go out. There is no
loop over cells or tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from twloss._precision import SUM_DTYPES
from twloss._rows.compiled import run_compiled
from twloss._torch import define_operator, is_transformed

_ROWS_A_PLACE = 16  # from so many on, a table of all combinations of ids costs less than it saves
_CHUNK = 8192  # rows whose places and values stay in a cache
_BLOCK = 1024  # rows that are added one after another in float32, where there is no float64


def cells_of(sizes: Sequence[int]) -> int:
    """The number of cells of dimensions of so many ids."""
    return sum(sizes) + len(sizes)


def append_cells(
    totals: Sequence[Tensor | float],
    rows: Sequence[Tensor | None],
    ids: Tensor,
    sizes: tuple[int, ...],
    *,
    fused: bool = False,
) -> list[Tensor | float]:
    """Sums of a batch with those of each cell below them, ``(1 + cells, tasks)``.

    Args:
        totals: ``(tasks,)`` each, after the first one also numbers that all tasks share.
        rows: what each is the sum of, ``(rows, tasks)``; several rows may be seen as one, and the last be filled up.
            None: 1 of each row.
        ids: as for ``sum_cells``, and so the next.
        sizes: see there.
        fused: whether compiled code may call compiled code.
    """
    first = totals[0]
    assert isinstance(first, Tensor)
    distinct: list[Tensor] = []
    places = []
    for each in rows:
        place = -1 if each is None else next((i for i, other in enumerate(distinct) if other is each), len(distinct))
        if each is not None and place == len(distinct):
            distinct.append(each)
        places.append(place)
    add = _SUM_CELLS if torch.compiler.is_compiling() else sum_cells
    detached, counts = [each.detach() for each in distinct], any(each is None for each in rows)
    by_cell = add(detached, first.numel(), ids, sizes, counts, fused).unbind(0)
    found: list[Tensor | float] = []
    for total, place in zip(totals, places):
        # Not full(): the compiler would make a constant of a number.
        total = total if isinstance(total, Tensor) else torch.ones_like(first) * total  # noqa: PLW2901
        found.append(torch.cat((total.to(first).unsqueeze(0), by_cell[place])))
    return found


def sum_cells(  # noqa: PLR0917 (an operator)
    rows: Sequence[Tensor], tasks: int, ids: Tensor, sizes: Sequence[int], counts: bool, fused: bool = False
) -> Tensor:
    """The sums of some values over the rows of each cell, ``(sums, cells, tasks)``, in the widest dtype.

    It is an operator too, which compiled code calls: what the compiler makes of it takes several times as long.

    Args:
        rows: the values, ``(rows, tasks)`` each, or several rows side by side, the last ones padded. They are reshaped
            here: where the caller does it, the compiler computes them twice.
        tasks: the number of tasks.
        ids: ``(dimensions, rows, 1 or tasks)`` int64; those outside of 0…size-1 are of the cell "other".
        sizes: the number of ids of each dimension.
        counts: whether to count the rows too, last.
        fused: whether to do it by compiled code on a CPU, which takes half as long.
    """
    if fused and ids.is_cpu and ids.shape[2] == 1:
        made: Tensor = run_compiled(_sum_cells_in_one_loop, (tasks, tuple(sizes), counts), ids, *rows, threads=1)
        return made
    if is_transformed(ids, *rows):  # a transform forbids writing its tensors into ours in place
        return _sum_cells_in_one_loop(tasks, tuple(sizes), counts, ids, *rows)
    # Dimensions share one pass, by a table of all combinations of their ids, if that is small beside the rows.
    rows = _see_rows(rows, tasks, ids)
    groups: list[list[int]] = []
    places = 0
    for dimension, size in enumerate(sizes):
        places *= size + 2
        if groups and _ROWS_A_PLACE * places <= ids.shape[1]:
            groups[-1].append(dimension)
        else:
            groups.append([dimension])
            places = size + 2
    found = []
    for group in groups:
        own = [sizes[each] for each in group]
        table = _sum_places(rows, tasks, ids[group[0] : group[-1] + 1], own, counts)
        for axis in range(1, len(group) + 1):
            others = [each for each in range(1, len(group) + 1) if each != axis]
            below, cells = (table.sum(others) if others else table).tensor_split((1,), 1)
            cells[:, -1:] += below
            found.append(cells)
    return torch.cat(found, 1)


def _sum_places(rows: Sequence[Tensor], tasks: int, ids: Tensor, sizes: Sequence[int], counts: bool) -> Tensor:
    """The sums ``(sums, size + 2 of each dimension, tasks)`` of the ids, those below 0 first, and those above last."""
    _, count, columns = ids.shape
    dtype = SUM_DTYPES.get(ids.device.type, torch.float64)
    shape = [size + 2 for size in sizes]
    places, blocks = math.prod(shape), 1 if dtype == torch.float64 else -(-count // _BLOCK)
    sums = ids.new_zeros(len(rows), blocks * places * tasks, dtype=dtype)
    counted, one = ids.new_zeros(blocks * places * columns, dtype=dtype), ids.new_ones((), dtype=dtype)
    # So many rows as a cache holds; to an accelerator each call is dear.
    most = min(count, _CHUNK) if ids.is_cpu else count
    columns_of_task = torch.arange(tasks, device=ids.device)
    index, wide = ids.new_empty(most, tasks), ids.new_empty(most, tasks, dtype=dtype)
    for start in range(0, count, max(1, most)):
        part = ids[:, start : start + most]
        place = torch.zeros_like(part[0])
        for each, size in zip(part.unbind(0), sizes):
            place.mul_(size + 2).add_(each.clamp(-1, size)).add_(1)
        if blocks > 1:
            block = torch.arange(start, start + len(place), device=ids.device) // _BLOCK
            place.add_(block.unsqueeze(1), alpha=places)
        index, wide = index[: len(place)], wide[: len(place)]
        torch.add(columns_of_task, place, alpha=tasks, out=index)
        for sum_, values in zip(sums.unbind(0), rows):
            wide.copy_(values[start : start + most])
            sum_.scatter_add_(0, index.view(-1), wide.view(-1))
        if counts:
            at = (place if columns == 1 else index).view(-1)
            counted.scatter_add_(0, at, one.expand(at.shape))
    if counts:
        sums = torch.cat((sums, counted.view(1, -1, columns).expand(1, -1, tasks).reshape(1, -1)))
    return sums.view(-1, blocks, *shape, tasks).sum(1)


def _see_rows(rows: Sequence[Tensor], tasks: int, ids: Tensor) -> list[Tensor]:
    return [each.reshape(-1, tasks)[: ids.shape[1]] for each in rows]


def _sum_cells_in_one_loop(tasks: int, sizes: tuple[int, ...], counts: bool, ids: Tensor, *rows: Tensor) -> Tensor:
    """``sum_cells`` for the compiler, which is fast on one thread, where no addition is atomic, and for transforms."""
    rows, dtype, found = tuple(_see_rows(rows, tasks, ids)), SUM_DTYPES.get(ids.device.type, torch.float64), []
    is_shared = ids.shape[2] == 1
    for each, size in zip(ids.unbind(0), sizes):
        place = each.where((each >= 0) & (each < size), size)
        at = (place.squeeze(1),) if is_shared else (place, torch.arange(tasks, device=ids.device))
        zeros = ids.new_zeros(size + 1, tasks, dtype=dtype)
        sums = [zeros.index_put(at, values.to(dtype), accumulate=True) for values in rows]
        if counts:
            counted = zeros[:, :1] if is_shared else zeros
            sums.append(counted.index_put(at, zeros.new_ones(()), accumulate=True).expand(-1, tasks))
        found.append(torch.stack(sums))
    return torch.cat(found, 1)


def _fake_sum_cells(
    rows: Sequence[Tensor], tasks: int, ids: Tensor, sizes: Sequence[int], counts: bool, _: bool
) -> Tensor:
    dtype = SUM_DTYPES.get(ids.device.type, torch.float64)
    return ids.new_empty(len(rows) + counts, cells_of(sizes), tasks, dtype=dtype)


# Once: a reload finds it defined.
if "_LIBRARY" not in globals():
    _SCHEMA = "sum_cells(Tensor[] rows, SymInt tasks, Tensor ids, int[] sizes, bool counts, bool fused) -> Tensor"
    _LIBRARY, _SUM_CELLS = define_operator(_SCHEMA, sum_cells, _fake_sum_cells)
