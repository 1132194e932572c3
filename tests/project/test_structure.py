"""The package's map is true: what imports what, what is private, and which private names of others are in use."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from torch import nn
from torchmetrics import Metric

import twloss
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
    """The package's own modules that run when this one is imported; those for types alone do not."""
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    return {
        f"{node.module.partition('.')[2].replace('.', '/')}.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("twloss.")
        if id(node) not in for_types
    }


def test_the_map_names_every_module_once() -> None:
    _, by_import = lists_of_the_map()
    assert sorted(by_import) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_only_what_stands_above_it(module: str) -> None:
    _, by_import = lists_of_the_map()
    assert imports_of(tree_of(module)) <= set(by_import[: by_import.index(module)])


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
}
PUBLIC = {
    GlobalLoss: OF_SUMS,
    RankingQuality: OF_SUMS | {"ignore_index"},
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
