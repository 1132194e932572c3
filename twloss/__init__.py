"""Multi-task losses whose sums travel, so that the split of the rows over ranks and steps changes nothing.

A batch takes this way::

    _losses.py         forward, from top to bottom; what it gives is trained on
    _type_groups.py    the tasks of each loss type, where they differ                      and their sums, joined
    _batch.py          tensors or mappings -> one aligned Batch                            (rows, tasks)
    _columns.py        mappings task -> tensor, stacked                                    (rows, tasks)
    _bce.py            binary cross-entropy: all of the next three in one function          (tasks,)
    _row_sums.py       Σ w·l over the rows -> TaskSums                                     (tasks,)
    _loss_type.py      the formula of each loss, unreduced                                 (rows, tasks)
    _ranks.py          TaskSums of all ranks, with their gradient                          (tasks,)
    _reduction.py      TaskSums -> {"loss/<task>": …, "loss": …}
    _metric.py         the batch's sums, detached -> added to those of all steps           (2, 1 + places, sums, tasks)
    _accumulator.py    the number format of those
    _global_loss.py    compute(): the sums of all steps and ranks -> _reduction.py

Each file imports only what stands above it::

    _torch.py          every private name of torch and torchmetrics in use
    _accumulator.py
    _arguments.py      constructor arguments, checked
    _columns.py
    _loss_type.py
    _batch.py
    _row_sums.py
    _ranks.py
    _reduction.py
    _checkpoint.py     running sums in a state_dict, of one rank or of all
    _pending.py        a result that is under way
    _scalar_view.py    one key of a metric as a metric
    _metric.py
    _global_loss.py
    _ranking_quality.py  RankingQuality: normalised entropy and calibration of all rows of all steps and ranks
    _bce.py
    _type_groups.py
    _losses.py
    _the_algorithm_ml.py  the signatures of the-algorithm-ml
"""

from twloss._checkpoint import global_sums
from twloss._global_loss import GlobalLoss
from twloss._loss_type import LossType
from twloss._losses import Loss, MultiTaskLoss
from twloss._pending import PendingResult
from twloss._ranking_quality import RankingQuality
from twloss._scalar_view import ScalarView
from twloss._the_algorithm_ml import build_loss, build_multi_task_loss, get_global_loss_detached

__all__ = [
    "GlobalLoss",
    "Loss",
    "LossType",
    "MultiTaskLoss",
    "PendingResult",
    "RankingQuality",
    "ScalarView",
    "build_loss",
    "build_multi_task_loss",
    "get_global_loss_detached",
    "global_sums",
]

__version__ = "0.1.0"
