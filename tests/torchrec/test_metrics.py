"""RankingQuality and TorchRec's own metrics: the same numbers, but for conventions, each of which is shown here."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.results import fed, numbers
from tests.torchrec.one_process import one_process, run_on_ranks
from twloss import RankingQuality

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # by TorchRec's and torch's own modules
    pytest.importorskip("torchrec", reason="TorchRec needs an environment of its own")
    from torchrec.metrics.calibration import CalibrationMetric
    from torchrec.metrics.ctr import CTRMetric
    from torchrec.metrics.metrics_config import RecTaskInfo
    from torchrec.metrics.ne import NEMetric
    from torchrec.metrics.rec_metric import RecComputeMode

TASKS = ["like", "reply", "share"]
SAME = ["ne", "calibration", "ctr"]
UNFUSED, FUSED = RecComputeMode.UNFUSED_TASKS_COMPUTATION, RecComputeMode.FUSED_TASKS_COMPUTATION
Batch = tuple[Tensor, Tensor, Tensor]
Numbers = dict[str, float]


def theirs(batches: list[Batch], tasks: list[str], window: int, rank: int, world_size: int, mode: Any) -> Numbers:
    """The three metrics' values, as RankingQuality names them."""
    info = [RecTaskInfo(name=name, label_name=name, prediction_name=name, weight_name=name) for name in tasks]
    found: Numbers = {}
    for kind, options in ((NEMetric, {"include_logloss": True}), (CalibrationMetric, {}), (CTRMetric, {})):
        settings = {"batch_size": 1, "tasks": info, "compute_mode": mode, "window_size": window}
        metric = kind(world_size=world_size, my_rank=rank, compute_on_all_ranks=True, **settings, **options)
        for logits, labels, weights in batches:
            columns = (logits.sigmoid(), labels, weights)
            predictions, *others = ({name: part[:, t] for t, name in enumerate(tasks)} for part in columns)
            metric.update(predictions=predictions, labels=others[0], weights=others[1])
        for key, value in metric.compute().items():
            name, _, quantity = key.partition("|")
            quantity = quantity.removeprefix("lifetime_")
            found[f"{quantity}/{name.rpartition('-')[2]}"] = value.item()
    return found


def ours(batches: list[Batch], tasks: list[str], window: int) -> Numbers:
    return numbers(fed(RankingQuality(tasks, window_rows=window), batches).compute())


def batches_of(rank: int, count: int = 20, rows: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(rank)
    found = []
    for _ in range(count):
        logits = 2 * torch.randn(rows, 3, dtype=torch.float64, generator=generator)
        labels = (torch.rand(rows, 3, generator=generator) < 0.3).double()
        found.append((logits, labels, torch.rand(rows, 3, dtype=torch.float64, generator=generator)))
    return found


def both_on_rank(rank: int, world_size: int, window: int, mode: str) -> tuple[Numbers, Numbers]:
    batches = batches_of(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = theirs(batches, TASKS, window, rank, world_size, RecComputeMode[mode])
    return found, ours(batches, TASKS, window)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [UNFUSED.name, FUSED.name])
@pytest.mark.parametrize("window", [32, 64, 1_000_000])
@pytest.mark.parametrize("world_size", [1, 2])
def test_they_agree_on_all_rows_and_on_a_window(
    world_size: int, window: int, mode: str, request: pytest.FixtureRequest
) -> None:
    """On all ranks, to rounding; a log loss in nats is one in bits times ln 2."""
    for found, own in run_on_ranks(world_size, request, both_on_rank, world_size, window, mode):
        for horizon in ("", "window_"):
            for task in TASKS:
                for name in SAME:
                    key = f"{horizon}{name}/{task}"
                    assert own[key] == pytest.approx(found[key], rel=1e-10)
                bits = found[f"{horizon}logloss/{task}"]
                assert own[f"{horizon}logloss/{task}"] == pytest.approx(bits * math.log(2), rel=1e-10)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


X, ONES = column(1.0, -2.0, 0.5, 3.0), column(1.0, 1.0, 1.0, 1.0)
CONVENTIONS: dict[str, tuple[list[Batch], dict[str, Any], dict[str, Any]]] = {
    # Theirs divides by the entropy of a base rate of 1e-12, and 0 / 0 is 0.
    "no positive label": (
        [(X, column(0, 0, 0, 0), ONES)],
        {"ne": pytest.approx(1.4e12, rel=0.1), "calibration": 0.0, "ctr": 0.0},
        {"ne": math.nan, "calibration": math.inf, "ctr": 0.0},
    ),
    "no negative label": (
        [(X, column(1, 1, 1, 1), ONES)],
        {"ne": pytest.approx(7.4e11, rel=0.1), "ctr": 1.0},
        {"ne": math.nan, "ctr": 1.0},
    ),
    "no data": (
        [],
        {"ne": math.nan, "calibration": 0.0, "ctr": 0.0, "logloss": 0.0},
        {"ne": math.nan, "calibration": math.nan, "ctr": math.nan, "logloss": math.nan},
    ),
    "weights of 0": (
        [(X, column(1, 0, 1, 1), 0 * ONES)],
        {"ne": math.nan, "calibration": 0.0, "ctr": 0.0, "logloss": 0.0},
        {"ne": math.nan, "calibration": math.nan, "ctr": math.nan, "logloss": math.nan},
    ),
    # A wrong logit of 50 costs 50 nats, or 12·log2(10) bits of a probability that is clipped at 1e-12.
    "an extreme logit": (
        [(column(50.0), column(0.0), column(1.0)), (column(-50.0), column(1.0), column(1.0))],
        {"ne": pytest.approx(12 * math.log2(10), rel=1e-4)},
        {"ne": pytest.approx(50 / math.log(2), rel=1e-12)},
    ),
    # Of 3 rows, the newest update has 2 and the one before it 2 more: theirs leaves that out, ours keeps it.
    "an update across the window's end": (
        [(X[:2], column(1, 1), ONES[:2]), (X[2:], column(1, 0), ONES[2:])],
        {"window_ctr": 0.5},
        {"window_ctr": 0.75},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONVENTIONS)
def test_where_they_differ(case: str) -> None:
    batches, of_theirs, of_ours = CONVENTIONS[case]
    with one_process():
        found, own = theirs(batches, ["like"], 3, 0, 1, UNFUSED), ours(batches, ["like"], 3)
    for values, expected in ((found, of_theirs), (own, of_ours)):
        for name, value in expected.items():
            assert values[f"{name}/like"] == (value if value == value else pytest.approx(value, nan_ok=True)), name  # noqa: PLR0124
