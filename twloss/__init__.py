"""Exact losses for multi-task models: the same numbers whatever the split of the rows over ranks and steps.

``MultiTaskLoss`` and ``Loss`` are attached to a model as submodules and return the loss to train on. They keep running
sums of each task's loss, from which ``train_metric`` and ``eval_metric``, torchmetrics ``Metric``s, compute the loss of
all rows of all steps and ranks as one process would: sums travel between ranks, and division comes last.

The code stands on three floors: ``_rows`` handles tensors with a row for each example, ``_sums`` a few numbers for each
task, ``_metrics`` the sums that outlive a batch. A batch first visits the files in this order, and from
``task_metric.py`` on at compute(); on the right, the shape that goes out::

    _losses.py                     Loss, MultiTaskLoss: forward
    _fx.py                         where torch.fx traces the model, a call is recorded and not run
    _rows/task_group.py            TaskGroup: the tasks that share a loss; joins the groups' sums
    _rows/mappings.py              stacks mappings task -> tensor                                   (rows, tasks)
    _rows/batch.py                 tensors -> one aligned Batch: shapes, dtypes, weights            (rows, tasks)
    _rows/row_pass.py              the one pass: Batch -> BatchSums, and sums for RankingQuality    (tasks,)
    _rows/binary_cross_entropy.py  the formulas of binary cross-entropy                             (rows, tasks)
    _rows/row_loss.py              LossType, and a RowLoss class for each: its needs, its formula   (rows, tasks)
    _rows/differentiable.py        weight times loss by plain operations, for autograd              (rows, tasks)
    _sums/running_sums.py          packs a batch's sums with their counters               (sums + counters, tasks)
    _sums/ranks.py                 the envelope (sums, hashes of names) and its all-reduce          (sums, tasks)
    _sums/reduction.py             the reductions: sums -> {"loss/<task>": …, "loss": …}            ()
    _metrics/kept_metric.py        adds the packed sums to those of all steps
    _metrics/task_metric.py        compute(): the running sums of all ranks -> {key: value}         ()
    _metrics/global_loss.py        GlobalLoss: what Reduction makes of a loss's running sums        ()
    _sums/pending.py               PendingResult: what an asynchronous compute() returns

Each file imports only what stands above it::

    _torch.py                      private names of torch and torchmetrics, and workarounds for their versions
    _precision.py                  the dtype of a sum; devices without float64
    _arguments.py                  checks of single arguments, the names that they may have (Literals), warnings
    _constants.py                  TaskConstants: one number a task, as tensors
    _sums/sums.py                  TaskSums, BatchSums: the records that are passed between files
    _sums/made_elsewhere.py        the sums that a caller made, checked
    _sums/pending.py
    _sums/running_sums.py          RunningSums (read, add, merge) and the number format of a metric's state
    _sums/ranks.py
    _sums/reduction.py
    _rows/mappings.py
    _rows/binary_cross_entropy.py
    _rows/row_loss.py
    _rows/batch.py
    _rows/differentiable.py
    _rows/compiled.py              a function of tensors, compiled
    _rows/cell_sums.py             the sums of the rows of each cell of segments
    _rows/row_pass.py
    _rows/segments.py              Segments: its dimensions and cells; the ids of a batch's rows, aligned
    _rows/task_group.py
    _metrics/checkpoint.py         the format of running sums in a state_dict: bytes of one rank or of all
    _metrics/kept_metric.py        KeptMetric: a metric's state in a model's life: casts, copies, threads, merges
    _metrics/plot.py               pictures of results
    _metrics/scalar_view.py        ScalarView: one key of a metric as a metric
    _metrics/task_metric.py        TaskMetric: the base of every metric (each a file of its own); keys, nan_strategy
    _metrics/global_loss.py
    _metrics/together.py           compute_all(): the results of several metrics by one collective
    _metrics/ranking_quality.py    RankingQuality: normalised entropy, calibration, … as ratios of sums
    _options.py                    LossOptions: the settings of a loss, checked against each other, once
    _fx.py
    _settings.py                   HasSettings: these as a loss's attributes, of which task_weights can be set
    _tracking.py                   TracksSums: a loss's metrics of both modes
    _losses.py
    _the_algorithm_ml.py           build_loss, …: the signatures of Twitter's the-algorithm-ml

Beside them, ``demo`` is the folder that ``python -m twloss`` runs.
"""

from twloss._losses import Loss, MultiTaskLoss
from twloss._metrics.checkpoint import global_sums
from twloss._metrics.global_loss import GlobalLoss
from twloss._metrics.ranking_quality import RankingQuality
from twloss._metrics.scalar_view import ScalarView
from twloss._metrics.task_metric import TaskMetric
from twloss._metrics.together import compute_all, compute_all_async
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
    "compute_all",
    "compute_all_async",
    "get_global_loss_detached",
    "global_sums",
]

__version__ = "0.1.0"
