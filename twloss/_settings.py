"""The settings of a loss as its attributes: all can be read, and only the weights of the tasks be set.

``LossOptions`` come in, which ``_losses.py`` reads directly; nothing here is on the way of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from twloss._arguments import GradientReduction, IgnoreIndex, MeanOver, PerTask, list_some, per_task_numbers
from twloss._constants import TaskConstants
from twloss._options import LossOptions
from twloss._sums.reduction import GlobalReduction
from twloss._torch import hidden_from_jit

# Arguments that one of the losses does not have, but the other does, or torch's; and those that are meant.
_MEANT_OF_ONE = {
    "global_reduction": "reduction, which is over rows: a single task has no other",
    "pos_weights": "pos_weight",
    "task_loss_reduction": "reduction",
    "task_weights": "a MultiTaskLoss, which takes it",
    "tasks": "a MultiTaskLoss, which takes it",
    "weight": "weights of rows in forward, or pos_weight",
    "weights": "weights of rows in forward, or pos_weight",
}
_MEANT_OF_SEVERAL = {
    "pos_weight": "pos_weights",
    "reduction": "task_loss_reduction, over rows, or global_reduction, over tasks",
    "weight": "weights of rows in forward, task_weights or pos_weights",
    "weights": "weights of rows in forward, task_weights or pos_weights",
}

METRICS = ("train_metric", "eval_metric")
QUALITY = ("train_quality", "eval_quality")


@hidden_from_jit
class HasSettings(nn.Module):
    """The base of the losses: their settings and metrics, as attributes that no assignment replaces.

    Args:
        options: the settings.
        task_weights: the one that can be set later.
        loss_types: those of the tasks, by the names that they have as submodules where they are modules.
    """

    loss_type: Any
    tasks: tuple[str, ...] | None
    global_reduction: GlobalReduction
    mean_over: MeanOver
    ignore_index: IgnoreIndex
    global_batch: bool
    gradient_reduction: GradientReduction
    process_group: dist.ProcessGroup | None
    quality: bool
    segments: dict[str, tuple[str, ...] | int] | None
    validate_args: bool
    fused: bool

    def __init__(
        self, options: LossOptions, task_weights: tuple[float, ...] | None, loss_types: Mapping[str, object]
    ) -> None:
        super().__init__()
        self._task_weights = TaskConstants(task_weights, (1.0,) * len(options.columns))
        # Modules are trained with the loss, as its submodules.
        for name, module in {**loss_types, "global_reduction": options.global_reduction}.items():
            if isinstance(module, nn.Module):
                self.add_module(name, module)
        self._options = options  # from here on, __setattr__ refuses the settings' names

    if not TYPE_CHECKING:  # the signature is that of __init__

        def __new__(cls, *_: Any, **keywords: Any) -> HasSettings:
            if cls.__init__.__module__ == "twloss._losses":  # a subclass's own takes what it likes
                _refuse_unknown(cls, keywords)
            return super().__new__(cls)

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        options = self._options
        types = options.loss_type
        name = list_some(types, 12) if isinstance(types, dict) else getattr(types, "value", types)
        tasks = None if options.tasks is None else list_some(options.tasks, 12)
        rule = options.task_loss_reduction
        return f"{name}, tasks={tasks}, reduction={rule}, global_batch={options.global_batch}"

    @property
    def task_weights(self) -> tuple[float, ...] | None:
        """The factors of the tasks' losses in the global one; set, in any form that the constructor takes, at any time.

        It reaches forward and both metrics at once, whose compute() weighs all steps by it; a compiled forward is not
        compiled again, and a backward pass that is under way keeps the factors that its forward had.
        """
        return self._task_weights.numbers

    @task_weights.setter
    def task_weights(self, values: PerTask | None) -> None:
        self._task_weights.set(per_task_numbers("task_weights", values, self._options.columns))

    def __setattr__(self, name: str, value: Any) -> None:
        options, modules = self.__dict__.get("_options"), self.__dict__.get("_modules", {})
        # TorchRec's DistributedModelParallel puts each child of a module back in its place.
        is_setting = name.startswith("loss_type_") or (options is not None and name in self._read_only())
        if options is not None and is_setting and modules.get(name, self) is not value:
            raise AttributeError(f"{name} is read-only: create a new loss")
        if name == "task_weights":
            # Past nn.Module, which would register a parameter or a module under the name.
            object.__setattr__(self, name, value)
            return
        super().__setattr__(name, value)

    def _read_only(self) -> Iterable[str]:
        """The names that can't be set after construction: settings and submodules."""
        names = {*vars(self._options), *self._options.settings, *self._modules, *METRICS, *QUALITY}
        return names if self._options.tasks is not None else {*names, "task_weights"}

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            settings = self._options.settings if "_options" in self.__dict__ else {}
            if name in settings:
                return settings[name]  # type: ignore[no-any-return]
            if name not in QUALITY:
                raise
        raise AttributeError(f"{name}: got a loss with quality=False, expected one that is made with quality=True")

    def __dir__(self) -> list[str]:
        return sorted(
            {
                *super().__dir__(),  # type: ignore[no-untyped-call]
                *self._options.settings,
            }
        )


def _refuse_unknown(cls: type[HasSettings], keywords: Iterable[str]) -> None:
    """Raise for an argument that the constructor does not have where it can be told which one is meant."""
    _, *parameters = inspect.signature(cls.__init__).parameters  # without self
    meant = _MEANT_OF_SEVERAL if "tasks" in parameters else _MEANT_OF_ONE
    for name in keywords:
        if name not in parameters:
            expected = meant.get(name) or " or ".join(get_close_matches(name, parameters))
            if expected:
                raise TypeError(f"{name}: got an argument that {cls.__name__} does not have, expected {expected}")
