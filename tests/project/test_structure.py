"""The package's map is true: what imports what, what is private, and which private names of others are in use."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

import twloss
from benchmarks.calls import calls, trace_calls
from benchmarks.workload import Setting
from twloss import GlobalLoss, Loss, MultiTaskLoss, RankingQuality, ScalarView
from twloss._torch import OVERRIDDEN

PACKAGE = Path(twloss.__file__).parent
MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for pattern in ("*.py", "_*/*.py")
    for path in PACKAGE.glob(pattern)
    if not path.name.startswith("__")
)


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


def lists_of_the_map() -> list[list[str]]:
    """The files that each list of the package's docstring names, in order."""
    assert twloss.__doc__ is not None
    lists = [re.findall(r"^    (_[\w/]+\.py)", part, re.MULTILINE) for part in twloss.__doc__.split("::\n")]
    return [names for names in lists if names]


def imports_of(tree: ast.Module) -> set[str]:
    """The package's own modules that this one imports, those for types alone included."""
    return {
        f"{node.module.partition('.')[2].replace('.', '/')}.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("twloss.")
    }


def test_the_map_names_every_module_once() -> None:
    _, by_import = lists_of_the_map()
    assert sorted(by_import) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_only_what_stands_above_it(module: str) -> None:
    _, by_import = lists_of_the_map()
    assert imports_of(tree_of(module)) <= set(by_import[: by_import.index(module)])


BELOW = {"_torch.py", "_precision.py", "_arguments.py", "_constants.py"}
FLOORS = ("_sums", "_rows", "_metrics")
"""From the lowest."""


def floor_of(module: str) -> int:
    """Of a file in the folder of a floor; -1 of one below all, 3 of one above all."""
    folder = module.partition("/")[0]
    return -1 if module in BELOW else FLOORS.index(folder) if folder in FLOORS else len(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_no_floor_imports_a_higher_one(module: str) -> None:
    assert max((floor_of(each) for each in imports_of(tree_of(module))), default=-1) <= floor_of(module)


def squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square()


def test_the_way_of_a_batch_is_that_which_a_batch_takes() -> None:
    """Of tasks of two losses in mappings, over ranks, and then of its running sums to a result."""
    loss = MultiTaskLoss({"like": "bce_with_logits", "price": squared}, ["like", "price"], global_batch=True)
    metric = loss.train_metric  # which is looked up among the loss's attributes, in a file of their own
    logits, rows = torch.ones(4, requires_grad=True), {"like": torch.ones(4), "price": torch.ones(4)}
    trace = trace_calls(lambda: (loss({**rows, "like": logits}, rows, rows), metric.compute()))
    visited = list(dict.fromkeys(call.file for call in trace))
    way, _ = lists_of_the_map()
    assert way == [file for file in visited if file not in BELOW]


def test_no_call_wanders_further_than_its_goal() -> None:
    """So many calls, files and changes of file, of which a forward has fourteen."""
    assert [row for row in calls(Setting(torch.device("cpu"), quick=True)) if not row.is_met()] == []


def nodes_of(*kinds: type[ast.AST], without: str = "") -> list[tuple[str, Any]]:
    """The nodes of these kinds in all modules but one, with their modules."""
    modules = [module for module in MODULES if module != without]
    return [(module, node) for module in modules for node in ast.walk(tree_of(module)) if isinstance(node, kinds)]


def test_one_file_alone_asks_which_loss_it_has() -> None:
    """All that differs between losses is behind the methods and attributes of ``RowLoss``."""
    losses = {"LossType", "BinaryCrossEntropy", "CrossEntropy", "CallableLoss"}
    asked = []
    for module, node in nodes_of(ast.Attribute, ast.Compare, ast.Call, without="_rows/row_loss.py"):
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & losses
        is_question = not isinstance(node, ast.Call) or ast.unparse(node.func) in ("isinstance", "issubclass")
        asked += [(module, ast.unparse(node))] if names and is_question else []
    assert asked == []


def test_there_are_at_most_six_kinds_of_record() -> None:
    records = {
        node.name
        for _, node in nodes_of(ast.ClassDef)
        if any(ast.unparse(base) == "NamedTuple" for base in node.bases)
        or any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert records == {"Batch", "BatchSums", "LossOptions", "Plan", "Reduction", "TaskSums"}


@pytest.mark.parametrize("module", MODULES)
def test_no_file_and_no_function_is_long(module: str) -> None:
    """Docstrings count in a file, and not in a function."""
    assert len((PACKAGE / module).read_text().splitlines()) <= 450
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            assert node.end_lineno is not None
            assert node.end_lineno - node.body[0].end_lineno <= 45, node.name  # type: ignore[operator]


def test_every_module_is_private_and_the_api_is_the_package() -> None:
    assert all(module.startswith("_") for module in MODULES)
    assert twloss.__all__ == sorted(twloss.__all__)


def private_names(tree: ast.Module) -> set[str]:
    """The attributes with a leading underscore that are read, called or defined."""
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in used | defined if name.startswith("_") and not name.startswith("__")}


class Plain(Metric):
    """A metric with nothing of its own."""

    def update(self) -> None:
        """Nothing."""

    def compute(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("module", MODULES)
def test_private_names_of_torch_and_torchmetrics_are_those_that_are_listed(module: str) -> None:
    theirs = {name for name in [*dir(Plain()), *vars(Plain())] if name.startswith("_") and not name.startswith("__")}
    assert private_names(tree_of(module)) & theirs <= set(OVERRIDDEN)


def test_what_no_public_name_of_torch_reaches_is_called_in_one_file_alone() -> None:
    others = [module for module in MODULES if module != "_torch.py"]
    nodes = [node for module in others for node in ast.walk(tree_of(module))]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    ours |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    ours |= {ast.unparse(node.target) for node in nodes if isinstance(node, ast.AnnAssign)}
    used = set().union(*(private_names(tree_of(module)) for module in others))
    assert used - ours - set(OVERRIDDEN) == {"_getframe", "_replace"}  # Python's own
    assert not any("ops.aten" in (PACKAGE / module).read_text() for module in others)


def test_every_listed_name_is_in_use() -> None:
    assert set(OVERRIDDEN) <= set().union(*(private_names(tree_of(module)) for module in MODULES))


OF_SUMS = {
    *("compute_async", "keys", "scalar", "tasks", "nan_strategy", "window", "window_rows", "sums_of", "totals"),
    *("validate_args", "segments"),
}
PUBLIC = {
    GlobalLoss: OF_SUMS,
    RankingQuality: OF_SUMS | {"ignore_index", "logit_shift"},
    ScalarView: {"compute_async", "owner", "key", "totals"},
}


@pytest.mark.parametrize("kind", PUBLIC)
def test_a_metric_has_no_public_name_beyond_those_of_torchmetrics_and_its_own_few(kind: type[Metric]) -> None:
    owner = RankingQuality(["like"]) if kind is RankingQuality else GlobalLoss(["like"])
    metric = owner.scalar("loss") if kind is ScalarView else owner
    names = {name for name in [*dir(metric), *vars(metric)] if not name.startswith("_")}
    assert names - set(dir(Plain())) <= PUBLIC[kind]


OF_ALL_LOSSES = {
    *("loss_type", "tasks", "global_reduction", "task_weights", "mean_over", "ignore_index", "global_batch"),
    *("gradient_reduction", "process_group", "quality", "fused", "train_metric", "eval_metric"),
    *("validate_args", "segments", "compute", "compute_async", "count", "from_sums", "reset"),
}


@pytest.mark.parametrize(
    ("loss", "own"),
    [
        (Loss("bce_with_logits"), {"reduction", "pos_weight"}),
        (MultiTaskLoss("bce_with_logits", ["like"]), {"task_loss_reduction", "pos_weights"}),
    ],
    ids=["Loss", "MultiTaskLoss"],
)
def test_a_loss_has_its_settings_and_metrics_as_public_names_alone(loss: nn.Module, own: set[str]) -> None:
    names = {name for name in dir(loss) if not name.startswith("_")} - set(dir(nn.Module()))
    assert names == OF_ALL_LOSSES | own
