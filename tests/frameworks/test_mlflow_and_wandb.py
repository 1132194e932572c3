"""examples/mlflow_and_wandb.py, on one process and on two: what is read back is the losses of one process."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path
from unittest import mock

import pytest

from tests.support.by_hand import Curves, curves_of
from tests.support.rank_pool import RankPool

pytest.importorskip("mlflow", reason="needs the extra mlflow; see constraints-frameworks.txt")
pytest.importorskip("wandb", reason="needs the extra wandb; see constraints-frameworks.txt")

from mlflow import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

from examples import mlflow_and_wandb as example

EPOCHS = 3
# Nothing is sent anywhere, and nothing tries to.
SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
# MLflow's own, of SQLAlchemy.
NO_LOAD = "The ``noload`` loader strategy is deprecated"
# wandb's log: blocks of this size, in which each piece of a record has a checksum, a length and a kind before it.
BLOCK, FILE_HEADER, PIECE_HEADER = 32768, 7, struct.Struct("<IHB")
LAST_PIECES = (1, 4)


def run_on_rank(rank: int, folder: Path) -> None:
    with warnings.catch_warnings(), mock.patch.dict(os.environ, SETTINGS):
        warnings.filterwarnings("ignore", NO_LOAD)
        example.main(folder, EPOCHS)


@pytest.fixture(scope="module")
def truth() -> Curves:
    """One process by hand: the curves of both modes."""
    by_mode = curves_of(example, EPOCHS)
    return {f"{mode}/{key}": points for mode, curves in by_mode.items() for key, points in curves.items()}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example has written."""
    path = tmp_path_factory.mktemp("runs")
    if request.param == 1:
        run_on_rank(0, path)
    else:
        pool: RankPool = request.getfixturevalue("two_ranks")
        pool.run(run_on_rank, path)
    return path


def expect_the_truth(curves: Curves, truth: Curves) -> None:
    assert set(curves) == set(truth)
    for key, points in truth.items():
        assert [step for step, _ in curves[key]] == [step for step, _ in points]
        assert [x for _, x in curves[key]] == pytest.approx([x for _, x in points], rel=1e-12)


@pytest.mark.filterwarnings(f"ignore:{NO_LOAD}")
def test_mlflow_has_one_run_with_the_losses_of_one_process(folder: Path, truth: Curves) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    expect_the_truth({key: [(each.step, each.value) for each in points] for key, points in history.items()}, truth)


def records_in(path: Path) -> list[bytes]:
    """The records of wandb's log, put together from their pieces."""
    data, at, records, record = path.read_bytes(), FILE_HEADER, [], b""
    while at + PIECE_HEADER.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < PIECE_HEADER.size:  # too short for a piece: zeros
            at += left
            continue
        _, length, kind = PIECE_HEADER.unpack_from(data, at)
        at += PIECE_HEADER.size
        record += data[at : at + length]
        at += length
        if kind in LAST_PIECES:
            records.append(record)
            record = b""
    return records


def test_wandb_has_one_run_with_the_losses_of_one_process(folder: Path, truth: Curves) -> None:
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    curves: Curves = {}
    for data in records_in(path):
        history = Record.FromString(data).history
        for item in history.item:
            key = item.key or ".".join(item.nested_key)
            if not key.startswith("_"):  # wandb's own: the time, and the step
                curves.setdefault(key, []).append((history.step.num, json.loads(item.value_json)))
    expect_the_truth(curves, truth)
