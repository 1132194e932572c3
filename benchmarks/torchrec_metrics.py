"""torchrec_metrics: quality over two ranks against TorchRec's own metrics, in the environment that has TorchRec.

RankingQuality, with a window of rows, against a RecMetricModule of normalised entropy, calibration and CTR, which
computes tasks one by one, or fused. Both give all rows and a window, on all ranks. And a loss's metrics of training and
of evaluation, by one compute_all(), against a RecMetricModule for each.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.paired import Timings
from benchmarks.ranks import run_on_ranks, seconds_from_a_barrier
from benchmarks.row import Row, at_least, speedup
from benchmarks.workload import OURS, Setting
from twloss import MultiTaskLoss, RankingQuality, compute_all

__all__ = ["torchrec_metrics"]

ROWS, WINDOW = 4096, 1_000_000
MODES = {"RecMetricModule": "UNFUSED_TASKS_COMPUTATION", "RecMetricModule, fused": "FUSED_TASKS_COMPUTATION"}
TASKS = (3, 20)
# The slower of the two rivals, then the faster.
UPDATE, COMPUTE = (at_least(2), at_least(1.5)), (at_least(10), at_least(5))
HEADLINE = "compute() of quality on 2 ranks, 3 tasks, against TorchRec's fused metrics"
OF_ALL = at_least(5)
HEADLINES = {(3, "compute", "RecMetricModule, fused"): HEADLINE}


class _Subject(NamedTuple):
    update: Callable[[], object]
    compute: Callable[[], object]


def torchrec_metrics(setting: Setting) -> Iterator[Row]:
    """RankingQuality over ranks against TorchRec's RecMetricModule."""
    for tasks, (update, compute, of_all) in run_on_ranks(2, _measure, setting.quick)[0].items():
        for what, timings, goals in (("update", update, UPDATE), ("compute", compute, COMPUTE)):
            for rival, goal in zip(MODES, goals):
                headline = HEADLINES.get((tasks, what, rival), "")
                yield speedup(f"2 ranks, {tasks} tasks, {what}", timings, OURS, rival, goal, headline=headline)
        for rival in MODES:
            yield speedup(f"2 ranks, {tasks} tasks, train and eval at once", of_all, OURS, rival, OF_ALL)


def _measure(quick: bool) -> dict[int, tuple[Timings, Timings, Timings]]:
    """On one rank, by tasks: timings of update(), of compute(), and of that of training and evaluation at once."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = {}
    for tasks in TASKS:
        subjects = {OURS: _quality(tasks), **{name: _module(tasks, mode) for name, mode in MODES.items()}}
        seconds: list[dict[str, list[float]]] = [{name: [] for name in subjects} for _ in range(2)]
        for _ in range(3 if quick else 31):
            for name, subject in subjects.items():
                for times, call in zip(seconds, subject):
                    times[name].append(seconds_from_a_barrier(call))
        both: dict[str, list[float]] = {name: [] for name in subjects}
        pairs = {
            OURS: _losses(tasks),
            **{name: _both(_module(tasks, mode), _module(tasks, mode)) for name, mode in MODES.items()},
        }
        for _ in range(3 if quick else 31):
            for name, pair in pairs.items():
                pair.update()
                both[name].append(seconds_from_a_barrier(pair.compute))
        found[tasks] = (Timings(seconds[0]), Timings(seconds[1]), Timings(both))
    return found


def _both(train: _Subject, evaluation: _Subject) -> _Subject:
    return _Subject(lambda: (train.update(), evaluation.update()), lambda: (train.compute(), evaluation.compute()))


def _losses(tasks: int) -> _Subject:
    """The losses and the quality of training and evaluation, with windows."""
    names = [f"task{t}" for t in range(tasks)]
    quality = RankingQuality(names, window_rows=WINDOW)
    losses = {mode: MultiTaskLoss("bce_with_logits", names, quality=quality) for mode in ("train", "eval")}
    losses["eval"].eval()
    batch = _batch(tasks)
    return _Subject(lambda: [loss(*batch) for loss in losses.values()], lambda: compute_all(losses))


def _batch(tasks: int) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(ROWS, tasks)
    return logits, (torch.rand(ROWS, tasks) < 0.1).float(), torch.rand(ROWS, tasks)


def _quality(tasks: int) -> _Subject:
    metric = RankingQuality([f"task{t}" for t in range(tasks)], window_rows=WINDOW)
    batch = _batch(tasks)
    return _Subject(lambda: metric.update(*batch), metric.compute)


def _module(tasks: int, mode: str) -> _Subject:
    from torchrec.metrics import metric_module, metrics_config  # noqa: PLC0415 (not in every environment)
    from torchrec.metrics.rec_metric import RecComputeMode  # noqa: PLC0415

    names = [f"task{t}" for t in range(tasks)]
    info = [
        metrics_config.RecTaskInfo(
            name=name, label_name=f"{name}-label", prediction_name=f"{name}-prediction", weight_name=f"{name}-weight"
        )
        for name in names
    ]
    kinds = metrics_config.RecMetricEnum
    definition = metrics_config.RecMetricDef(rec_tasks=info, window_size=WINDOW)
    config = metrics_config.MetricsConfig(
        rec_tasks=info,
        rec_metrics=dict.fromkeys((kinds.NE, kinds.CALIBRATION, kinds.CTR), definition),
        rec_compute_mode=RecComputeMode[mode],
        compute_on_all_ranks=True,
    )
    module: Any = metric_module.generate_metric_module(
        metric_module.RecMetricModule, config, ROWS, dist.get_world_size(), dist.get_rank(), {}, torch.device("cpu")
    )
    logits, labels, weights = _batch(tasks)
    outputs: dict[str, torch.Tensor] = {}
    for t, name in enumerate(names):
        parts = {"prediction": logits[:, t].sigmoid(), "label": labels[:, t], "weight": weights[:, t]}
        outputs |= {f"{name}-{part}": values for part, values in parts.items()}
    return _Subject(lambda: module.update(outputs), module.compute)
