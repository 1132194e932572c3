"""Multi-task losses whose sums travel, so that the split of the rows over ranks and steps changes nothing.

One batch takes this way, a file a stage, each importing only what stands above it::

    arguments.py      arguments, checked
    wide_sum.py       the number format of a running sum
    batch.py          logits, labels, weights -> one aligned Batch                         (rows, tasks)
    task_columns.py   the same from one column a task, mappings among them -> Batch        (rows, tasks)
    loss_type.py      the unreduced loss                                                   (rows, tasks)
    task_sums.py      TaskSums, and the rule that turns sums into losses                   (tasks,)
    summed_loss.py    Σ w·l over the rows -> TaskSums                                      (tasks,)
    ranks.py          Σ over ranks, with or without a gradient                             (tasks,)
    saved_sums.py     running sums in a checkpoint
    running_sums.py   the life cycle of running sums, a torchmetrics Metric
    plots.py          results -> a picture
    scalar_view.py    one value of a metric with many, as a metric
    per_task_metric.py  what the two metrics below do alike: names, NaN rules, windows, results
    global_loss.py    GlobalLoss: the losses of all rows of all steps
    ranking_quality.py  RankingQuality: normalised entropy and calibration of all rows of all steps
    tracked_loss.py   the stages in a row, with the running sums beside them
    modules.py        Loss, MultiTaskLoss -> {"loss/<task>": …, "loss": …}
    builders.py       the signatures of the-algorithm-ml
"""

from twloss.builders import build_loss, build_multi_task_loss, get_global_loss_detached
from twloss.global_loss import GlobalLoss
from twloss.loss_type import LossType
from twloss.modules import Loss, MultiTaskLoss
from twloss.ranking_quality import RankingQuality

__all__ = [
    "GlobalLoss",
    "Loss",
    "LossType",
    "MultiTaskLoss",
    "RankingQuality",
    "build_loss",
    "build_multi_task_loss",
    "get_global_loss_detached",
]

__version__ = "0.1.0"
