"""Multi-task losses whose sums travel, so that the split of the rows over ranks and steps changes nothing.

A batch takes this way::

    _losses.py                  forward, from top to bottom; it returns what is trained on
    _rows/batch.py              tensors or mappings -> one aligned Batch                            (rows, tasks)
    _rows/mappings.py           mappings task -> tensor, stacked                                    (rows, tasks)
    _rows/row_pass.py           binary cross-entropy: the next three in one function                (tasks,)
    _rows/differentiable.py     weight times loss of each row, where autograd differentiates         (rows, tasks)
    _rows/row_loss.py           the formula of each loss, unreduced                                 (rows, tasks)
    _sums/ranks.py              TaskSums of all ranks, with their gradient                          (tasks,)
    _sums/reduction.py          TaskSums -> {"loss/<task>": …, "loss": …}
    _metrics/kept_metric.py     the batch's sums, detached -> added to those of all steps   (2, 1 + places, rows, tasks)
    _sums/running_sums.py       RunningSums, and the number format of their state
    _metrics/global_loss.py     compute(): the sums of all steps and ranks -> _sums/reduction.py

Each file imports only what stands above it::

    _torch.py                   every private name of torch and torchmetrics in use
    _precision.py               the dtype of a sum
    _arguments.py               checks of arguments
    _constants.py               numbers of each task, as tensors
    _sums/sums.py
    _sums/pending.py            a result that is under way
    _sums/running_sums.py       RunningSums, and the number format of their state
    _sums/ranks.py
    _sums/reduction.py
    _rows/mappings.py
    _rows/binary_cross_entropy.py
    _rows/row_loss.py
    _rows/batch.py
    _rows/differentiable.py
    _rows/row_pass.py
    _rows/task_group.py         the tasks of each loss, where they differ
    _metrics/checkpoint.py      running sums in a state_dict, of one rank or of all
    _metrics/kept_metric.py     a metric's state in a model's life: casts, copies, threads, ranks, checkpoints
    _metrics/plot.py
    _metrics/scalar_view.py     one key of a metric as a metric
    _metrics/task_metric.py     TaskMetric: update, compute, and the four methods that a metric brings
    _metrics/global_loss.py
    _metrics/ranking_quality.py RankingQuality: normalised entropy and calibration of all rows of all steps and ranks
    _options.py                 the settings of a loss
    _fx.py                      a loss in a graph of torch.fx
    _losses.py
    _the_algorithm_ml.py        the signatures of the-algorithm-ml
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
