"""Exact losses for multi-task models: the same numbers whatever the split of the rows over ranks and steps.

``MultiTaskLoss`` and ``Loss`` are attached to a model as submodules and return what is trained on. They keep running
sums of each task's loss, from which ``train_metric`` and ``eval_metric``, torchmetrics ``Metric``s, compute the loss of
all rows of all steps and ranks as one process would: sums travel, and division comes last.

The code stands on three floors: ``_rows`` has the data of a batch's size, ``_sums`` that of the tasks' size,
``_metrics`` the state that outlives a batch. A batch visits the files in this order (on the right, the shape that goes
out)::

    _losses.py                     Loss, MultiTaskLoss: forward; what can be set afterwards (task_weights)
    _fx.py                         where torch.fx traces the model, the call is recorded instead
    _rows/task_group.py            the tasks that share a loss: their sums, joined with those of other groups
    _rows/mappings.py              mappings task -> tensor, stacked                                 (rows, tasks)
    _rows/batch.py                 tensors -> one aligned Batch: shapes, dtypes, weights            (rows, tasks)
    _rows/row_pass.py              the one pass: Batch -> BatchSums, those of the quality too       (tasks,)
    _rows/binary_cross_entropy.py  the formulas of binary cross-entropy                             (rows, tasks)
    _rows/row_loss.py              LossType, and a RowLoss class for each: its needs, its formula   (rows, tasks)
    _rows/differentiable.py        weight times loss by plain operations, for autograd              (rows, tasks)
    _sums/running_sums.py          a batch's sums, packed with their counters                       (rows, tasks)
    _sums/ranks.py                 the envelope (sums, hashes of names) and its all-reduce          (tasks,)
    _sums/reduction.py             the reductions: sums -> {"loss/<task>": …, "loss": …}            ()
    _metrics/kept_metric.py        the packed sums, added to those of all steps
    _metrics/task_metric.py        compute(): the running sums of all ranks -> a result by key      ()
    _metrics/global_loss.py        GlobalLoss: its result is the Reduction of a loss's sums         ()
    _sums/pending.py               PendingResult: what an asynchronous compute() returns

Each file imports only what stands above it::

    _torch.py                      private names of torch and torchmetrics, and workarounds for their versions
    _precision.py                  the dtype of a sum; devices without float64
    _arguments.py                  the values that each setting may have; checks; warnings about reductions
    _constants.py                  one number a task, kept as tensors (of settings that _losses.py reads and sets)
    _sums/sums.py                  TaskSums, BatchSums: the records that are passed between files
    _sums/pending.py
    _sums/running_sums.py          RunningSums: their algebra, the number format of a metric's state, what a rank sends
    _sums/ranks.py
    _sums/reduction.py
    _rows/mappings.py
    _rows/binary_cross_entropy.py
    _rows/row_loss.py
    _rows/batch.py
    _rows/differentiable.py
    _rows/row_pass.py
    _rows/task_group.py
    _metrics/checkpoint.py         the bytes of running sums in a state_dict, of one rank or of all
    _metrics/kept_metric.py        a metric's state in a model's life: casts, copies, threads, ranks, checkpoints
    _metrics/plot.py               pictures of results
    _metrics/scalar_view.py        ScalarView: one key of a metric as a metric
    _metrics/task_metric.py        TaskMetric: the base of every metric (each a file of its own); keys, the NaN rule
    _metrics/global_loss.py
    _metrics/ranking_quality.py    RankingQuality: normalised entropy, calibration, … as ratios of sums
    _options.py                    LossOptions: the settings of a loss, checked once
    _fx.py
    _losses.py
    _the_algorithm_ml.py           build_loss, …: the signatures of Twitter's the-algorithm-ml

Beside them, ``demo`` is what ``python -m twloss`` runs.
"""

from twloss._losses import Loss, MultiTaskLoss
from twloss._metrics.checkpoint import global_sums
from twloss._metrics.global_loss import GlobalLoss
from twloss._metrics.ranking_quality import RankingQuality
from twloss._metrics.scalar_view import ScalarView
from twloss._metrics.task_metric import TaskMetric
from twloss._rows.row_loss import LossType
from twloss._sums.pending import PendingResult
from twloss._the_algorithm_ml import build_loss, build_multi_task_loss, get_global_loss_detached

__all__ = [
    "GlobalLoss",
    "Loss",
    "LossType",
    "MultiTaskLoss",
    "PendingResult",
    "RankingQuality",
    "ScalarView",
    "TaskMetric",
    "build_loss",
    "build_multi_task_loss",
    "get_global_loss_detached",
    "global_sums",
]

__version__ = "0.1.0"
