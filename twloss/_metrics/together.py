"""The results of several metrics by one collective for each process group: one flat dict, for a logger.

Metrics come in, alone, by name, or in a module with losses; their running sums are laid end to end behind one number,
the hash of what they are, and travel together. ``{key: value}`` of all metrics goes out, on the CPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.wrappers import MetricTracker

from twloss._arguments import check_bool, list_some
from twloss._metrics.task_metric import TaskMetric
from twloss._sums.pending import PendingResult
from twloss._sums.ranks import ColumnNames, group_or_default, place_in, start_sum_over_ranks, world_size
from twloss._sums.running_sums import CARRIED_ELSEWHERE, LOCK, RunningSums, are_counted, marks_of_rank
from twloss._torch import hidden_from_jit

# Ranks that ask for other metrics send as many numbers nevertheless, so that the hash tells: gloo ends the process
# where sizes differ. 32 KiB, which is the sums of four metrics of 100 tasks, travel about as fast as nothing.
_LEAST_SENT = 4096

_KIND = attrgetter("dtype", "ndim", "requires_grad")

Metrics = nn.Module | Mapping[str, nn.Module]
_Check = tuple[Tensor, str]
"""Whether a total is sound, 0-dim bool, and the error if it is not."""


@hidden_from_jit
class FeedsMetrics(nn.Module):
    """The base of the losses: their metrics of the mode that they are in, in one call."""

    def compute(self) -> dict[str, Tensor]:
        """All that the loss tracks in its mode, training or evaluation, by one collective; see ``compute_all()``.

        Every rank has to call it.

        Returns:
            The results of the mode's metrics in one dict: 0-dim detached float64 values on the CPU, NaN where there
            was no data.

        Raises:
            RuntimeError: what ``GlobalLoss.compute()`` raises.
        """
        return _start(self, f"{type(self).__name__}.compute()").wait()

    def compute_async(self) -> PendingResult[dict[str, Tensor]]:
        """Start what compute() does, and return at once; see ``GlobalLoss.compute_async()``."""
        return _start(self, f"{type(self).__name__}.compute_async()", is_async=True)

    def reset(self) -> None:
        """Set the sums of the mode's metrics to 0."""
        for metric in _metrics_in(self):
            metric.reset()

    def _idle_metrics(self) -> Iterable[TaskMetric]:
        """The metrics of the mode that the loss is not in."""
        raise NotImplementedError


def compute_all(metrics: Metrics, *, reset: bool = False) -> dict[str, Tensor]:
    """The results of several metrics in one flat dict, over all ranks, by one collective.

    It is one collective for each process group that the metrics have, whatever their number. Every rank has to call it,
    with the same metrics. What a metric's own settings say holds here too: ``nan_strategy``, ``sync_on_compute``,
    ``dist_sync_fn`` (which is then called for this metric).

    Args:
        metrics: a module, a metric, or a mapping name -> one of these, whose names become prefixes: "name/". A module
            stands for the metrics of all losses in it, of the mode that each is in, and for all other ``TaskMetric``s
            in it, those of a ``MetricCollection`` by their own keys, without its prefix. Other metrics are left alone.
            (An ``nn.ModuleDict`` is a module; ``dict()`` makes a mapping of it.)
        reset: whether to start the sums anew at the moment of which the results are. No row is lost: what is added
            meanwhile, by another thread too, counts in the next results. Where an error is raised, on every rank, the
            sums come back; until then other threads see them without these rows.

    Returns:
        0-dim detached float64 values on the CPU, to which they come by one copy; NaN where there was no data.

    Raises:
        TypeError: for anything but modules and mappings of these.
        ValueError: for equal keys, a module without losses and metrics of this package, or a metric of a process group
            that this process is not in.
        RuntimeError: where ranks ask for other metrics, and what ``GlobalLoss.compute()`` raises.

    Examples:
        >>> import torch
        >>> from twloss import MultiTaskLoss, compute_all
        >>> train = MultiTaskLoss("bce_with_logits", ["like"])
        >>> val = MultiTaskLoss("bce_with_logits", ["like"])
        >>> _ = train(torch.zeros(3, 1), torch.ones(3, 1))
        >>> _ = val(torch.zeros(2, 1), torch.ones(2, 1))
        >>> results = compute_all({"train": train, "val": val}, reset=True)
        >>> {key: round(value.item(), 4) for key, value in results.items()}
        {'train/loss/like': 0.6931, 'train/loss': 0.6931,
         'val/loss/like': 0.6931, 'val/loss': 0.6931}
    """
    return _start(metrics, "compute_all()", reset=reset).wait()


def compute_all_async(metrics: Metrics, *, reset: bool = False) -> PendingResult[dict[str, Tensor]]:
    """Start what ``compute_all()`` does, and return at once; see ``GlobalLoss.compute_async()``.

    Args:
        metrics: as for ``compute_all()``.
        reset: whether to start the sums anew now. Where ``wait()`` raises an error, their rows are lost.

    Returns:
        The pending result, whose ``wait()`` gives that of this moment.

    Raises:
        TypeError: as ``compute_all()``; for a reduction that is a module and can't be copied.
        ValueError: as ``compute_all()``.
    """
    return _start(metrics, "compute_all_async()", reset=reset, is_async=True)


class _Share:
    """One metric of a call: a copy of its sums, and what becomes of the total of all ranks.

    Args:
        prefix: of its keys.
        metric: the metric.
        is_async: whether its settings may have changed by the time that the total is there.
    """

    value: RunningSums
    """This rank's sums, at the moment of the call."""
    total: Tensor
    """Those of all ranks, ``(horizons, rows, tasks)``, once they are there."""

    def __init__(self, prefix: str, metric: TaskMetric, *, is_async: bool) -> None:
        self.metric = metric
        self.keys = [prefix + key for key in metric._all_keys]
        self.results_of = metric._results_of_now(is_async=is_async)  # may be refused, and with FSDP2 is a collective
        self.nan_strategy = metric.nan_strategy
        self.rank, _ = place_in(metric.process_group)
        self.is_over_ranks = metric.sync_on_compute and not metric._is_synced and metric.distributed_available_fn()
        if self.is_over_ranks:
            world_size(metric.process_group)  # a rank outside of it is refused before any collective
        name, *_ = metric._counterpart or (type(metric).__name__,)  # in a loss it tells the mode
        self.name = prefix + name
        cells = "" if metric._segments is None else f" by {list_some(metric._segments.names)}"
        self.shown = f"{self.name} of {list_some(metric.tasks or ('loss',))}{cells}"
        self.identity = self.name, type(metric).__qualname__, metric._names.hashes.numbers, metric._format.shape

    def receive(self, total: Tensor) -> list[_Check]:
        """Take the total, which was checked."""
        self.total = total
        return []

    def results(self) -> list[Tensor]:
        """The counts of the total, and then its values, on its device."""
        sums, counts = self.metric._format.split(self.total)
        with torch.no_grad():
            values = list(chain.from_iterable(map(self.results_of, sums)))
            # Those of a metric of one's own may be anything. Two sets, as there may be thousands of values.
            if set(map(type, values)) != {Tensor} or set(map(_KIND, values)) != {(counts.dtype, 0, False)}:
                values = [_to_number(value, counts) for value in values]
        return [counts, *values]

    def by_key(self, results: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        """The values by key, of what ``results()`` gave, on the CPU."""
        counts, *values = results
        self.metric._report(counts, self.nan_strategy)
        return zip(self.keys, values)


def _to_number(value: Any, like: Tensor) -> Tensor:
    """A number, or a tensor of one element of any type, as 0-dim."""
    number = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if number.numel() != 1:
        raise ValueError(f"_results: got a value of shape {tuple(number.shape)}, expected a 0-dim Tensor")
    return number.view(())


def _start(
    metrics: Metrics, call: str, *, reset: bool = False, is_async: bool = False
) -> PendingResult[dict[str, Tensor]]:
    """Start the results of metrics. Of a synchronous call they are there when it returns."""
    check_bool("reset", reset)
    shares = [_Share(prefix, metric, is_async=is_async) for prefix, metric in _by_prefix(metrics)]
    _refuse_equal_keys(shares)
    unique = {id(share.metric): share.metric for share in shares}.values() if reset else ()
    for metric in unique:
        metric._refuse_between_syncs(f"{call} with reset=True")
    taken = []
    try:
        with LOCK:  # so that all are of one moment
            for share in shares:
                share.value = share.metric._format.read_horizons(share.metric.totals)
            for metric in unique:
                taken.append((metric, metric._take()))
        pending = PendingResult.join(_start_totals(shares, call), call)
        results = pending.map(lambda checks: _finish(shares, list(chain.from_iterable(checks))))
        if not is_async:
            results.wait()
    except BaseException:
        for metric, state in taken:
            metric._give_back(state)
        raise
    return results


def _start_totals(shares: Sequence[_Share], call: str) -> list[PendingResult[list[_Check]]]:
    """Start the total of each metric: of those of a process group together, of any other in its own way."""
    started: list[PendingResult[list[_Check]]] = []
    groups: dict[dist.ProcessGroup | None, list[_Share]] = {}
    for share in shares:
        metric = share.metric
        if not share.is_over_ranks:
            share.total = share.value.of_rank(share.rank)
        elif metric.dist_sync_fn in (None, gather_all_tensors):
            groups.setdefault(group_or_default(metric.process_group), []).append(share)
        else:
            started.append(metric._start_sum(share.value, call, metric.dist_sync_fn).map(share.receive))
    return started + [_start_together(members, group, call) for group, members in groups.items()]


def _start_together(
    shares: Sequence[_Share], group: dist.ProcessGroup | None, call: str
) -> PendingResult[list[_Check]]:
    """Start one collective for the sums of all metrics of a process group.

    No call waits before all of its collectives are started: ranks with two groups in another order would wait for each
    other.
    """
    # A metric that no batch has reached yet may not be on the device where the others are.
    device = max((share.value.parts.device for share in shares), key=lambda device: device.type != "cpu")
    values = [share.value.to(device) for share in shares]
    rank, _ = place_in(group)
    sums = [value.of_rank(rank) for value in values]
    marks = marks_of_rank(values, rank)
    numbers = torch.cat([each.flatten() for each in (*sums, marks)])
    padding = max(_LEAST_SENT, 1 << len(numbers).bit_length()) - len(numbers) - 1
    names = _header(tuple(share.identity for share in shares), tuple(share.shown for share in shares))

    def receive(received: tuple[Tensor, Tensor]) -> list[_Check]:
        total, agree = received
        *parts, of_marks, _ = total.split([*(each.numel() for each in (*sums, marks)), padding])
        for share, own, part in zip(shares, sums, parts):
            share.total = part.view_as(own)
        return [(agree, names.fault), (are_counted(of_marks.view_as(marks)), CARRIED_ELSEWHERE)]

    return start_sum_over_ranks(F.pad(numbers, (0, padding)), names, group, call, is_async=True).map(receive)


@lru_cache(maxsize=16)
def _header(identities: tuple[Any, ...], shown: tuple[str, ...]) -> ColumnNames:
    """One name for what several metrics send: a training asks for the same ones again and again."""
    return ColumnNames([json.dumps(identities)], "metrics", list(shown))


def _finish(shares: Sequence[_Share], checks: Sequence[_Check]) -> dict[str, Tensor]:
    """The results of the totals, by one copy from a device."""
    try:
        results = [share.results() for share in shares]
    except Exception:
        _raise_faults(checks)  # first: where ranks disagree, the sums may be anything
        raise
    are_sound, *copies = _to_cpu([[is_sound for is_sound, _ in checks], *results])
    _raise_faults([(is_sound, fault) for is_sound, (_, fault) in zip(are_sound, checks)])
    return dict(chain.from_iterable(map(_Share.by_key, shares, copies)))


def _raise_faults(checks: Sequence[_Check]) -> None:
    """Raise for the first total that is not sound."""
    for is_sound, fault in checks:
        if not is_sound:
            raise RuntimeError(fault)


def _to_cpu(lists: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """Lists of tensors, on the CPU, by one copy from each device."""
    elsewhere = [each for own in lists for each in own if not each.is_cpu]
    if not elsewhere:
        return lists
    copies: dict[int, Tensor] = {}
    for device in {each.device for each in elsewhere}:
        there = [each for each in elsewhere if each.device == device]
        flat = torch.cat([each.flatten().to(torch.float64) for each in there]).cpu()
        parts = flat.split([each.numel() for each in there])
        copies.update((id(each), part.view(each.shape)) for each, part in zip(there, parts))
    return [[copies.get(id(each), each) for each in own] for own in lists]


def _by_prefix(metrics: Metrics) -> list[tuple[str, TaskMetric]]:
    """The metrics, with the prefixes of their keys."""
    if isinstance(metrics, Mapping):
        found = []
        for name, each in metrics.items():
            if not isinstance(name, str) or not isinstance(each, nn.Module):
                raise TypeError(
                    f"metrics: got {type(name).__name__} -> {type(each).__name__}, expected names -> modules or metrics"
                )
            found += [(f"{name}/", metric) for metric in _some_metrics_in(each, f"metrics[{name!r}]")]
        if not found:
            raise ValueError("metrics: got an empty mapping, expected names -> modules or metrics")
        return found
    if not isinstance(metrics, nn.Module):
        raise TypeError(f"metrics: got {type(metrics).__name__}, expected a module, a metric or a mapping of these")
    return [("", metric) for metric in _some_metrics_in(metrics, "metrics")]


def _some_metrics_in(module: nn.Module, argument: str) -> list[TaskMetric]:
    found = _metrics_in(module)
    if not found:
        raise ValueError(
            f"{argument}: got {type(module).__name__}, expected a Loss, a MultiTaskLoss, a TaskMetric, or a module "
            "that has one of these"
        )
    return found


def _metrics_in(module: nn.Module) -> list[TaskMetric]:
    """The metrics of a module, each once; of a loss, those of its mode."""
    found: dict[int, TaskMetric] = {}
    idle: set[int] = set()
    seen, stack = set(), [module]  # of ids, since a Metric's hash is that of its states, which takes a while
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, TaskMetric):
            found[id(each)] = each
            continue
        if isinstance(each, FeedsMetrics):
            idle.update(map(id, each._idle_metrics()))
        children: Iterable[Any] = each._modules.values()
        if isinstance(each, MetricCollection):
            children = each.values()  # in a compute group, one has the sums of all until they are asked for
        elif isinstance(each, (Metric, MetricTracker)):
            continue
        stack += reversed([child for child in children if child is not None])
    return [metric for key, metric in found.items() if key not in idle]


def _refuse_equal_keys(shares: Sequence[_Share]) -> None:
    keys = list(chain.from_iterable(share.keys for share in shares))
    if len(set(keys)) < len(keys):
        equal = [key for key, count in Counter(keys).items() if count > 1]
        raise ValueError(
            f"metrics: got {list_some(equal)} of more than one metric, expected each key once: pass a mapping "
            "name -> metric, whose names become prefixes"
        )
