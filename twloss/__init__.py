"""Losses of multi-task models that are exact whatever the split of the rows over ranks and steps.

``MultiTaskLoss`` and ``Loss`` are attached to a model as submodules and return what is trained on. They keep running
sums of each task's loss, from which ``train_metric`` and ``eval_metric``, torchmetrics ``Metric``s, compute the loss of
all rows of all steps and ranks as one process would: sums travel, and division comes last.

The code stands on three floors: ``_rows`` has what is of the size of a batch, ``_sums`` what is of the size of the
tasks, ``_metrics`` what lives on. A batch takes this way::

    _losses.py                     forward, from top to bottom; it returns what is trained on
    _fx.py                         where torch.fx traces the model, the call is recorded instead
    _rows/task_group.py            the tasks that share a loss: aligned, summed, joined with the others'
    _rows/mappings.py              mappings task -> tensor, stacked                            (rows, tasks)
    _rows/batch.py                 tensors -> one aligned Batch                                (rows, tasks)
    _rows/row_pass.py              the one pass: Batch -> BatchSums; kernels, compiled or by autograd   (tasks,)
    _rows/binary_cross_entropy.py  the formulas of binary cross-entropy                        (rows, tasks)
    _rows/row_loss.py              RowLoss: a class a loss, what it needs and its formula      (rows, tasks)
    _rows/differentiable.py        weight times loss, for autograd to differentiate            (rows, tasks)
    _sums/running_sums.py          a batch's sums, packed for the running ones                 (rows of sums, tasks)
    _sums/ranks.py                 the envelope in which sums travel over ranks                (tasks,)
    _sums/reduction.py             sums -> {"loss/<task>": …, "loss": …}: the only division of losses
    _metrics/kept_metric.py        the sums, added to those of all steps
    _metrics/task_metric.py        compute(): running sums of all ranks -> a result by key
    _metrics/global_loss.py        … which of a loss is the Reduction of its sums
    _sums/pending.py               a result that is under way

Each file imports only what stands above it::

    _torch.py                      every private name of torch and torchmetrics in use
    _precision.py                  the dtype of a sum; devices without float64
    _arguments.py                  checks of arguments, and the warnings of reductions
    _constants.py                  numbers of each task (pos_weights, task_weights), as tensors
    _sums/sums.py                  TaskSums, BatchSums: the currency
    _sums/pending.py
    _sums/running_sums.py          RunningSums, their algebra, and the number format of a metric's state
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
    _metrics/plot.py
    _metrics/scalar_view.py        one key of a metric as a metric
    _metrics/task_metric.py        TaskMetric: update, compute, the NaN rule, the four methods that a metric brings
    _metrics/global_loss.py
    _metrics/ranking_quality.py    RankingQuality: normalised entropy and calibration
    _options.py                    LossOptions: the settings of a loss, checked once
    _fx.py
    _losses.py
    _the_algorithm_ml.py           the signatures of the-algorithm-ml
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
