"""examples/tensorboard_logging.py, on one process and on two: the event files hold the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from examples import tensorboard_logging as example
from tests.support.by_hand import Curves, curves_of
from tests.support.launch import script
from tests.support.rank_pool import RankPool

EPOCHS = 3


def run_on_rank(rank: int, directory: Path) -> None:
    example.main(directory, EPOCHS)


@pytest.fixture(scope="module")
def truth() -> dict[str, Curves]:
    """One process by hand: each mode's curves."""
    return curves_of(example, EPOCHS)


def curves_in(directory: Path) -> Curves:
    """What TensorBoard reads from the one event file of a directory."""
    assert len(list(directory.iterdir())) == 1
    events = EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {events.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags} == {"scalars"}
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)] for tag in tags
    }


def expect_the_truth(directory: Path, truth: dict[str, Curves]) -> None:
    for mode, curves in truth.items():
        read = curves_in(directory / mode)
        assert list(read) == ["loss/like", "loss/reply", "loss/share", "loss"]
        for key, points in curves.items():
            assert [step for step, _ in read[key]] == [step for step, _ in points]
            assert [x for _, x in read[key]] == pytest.approx([x for _, x in points], rel=1e-12)


def test_one_process(tmp_path: Path, truth: dict[str, Curves]) -> None:
    run_on_rank(0, tmp_path)
    expect_the_truth(tmp_path, truth)


def test_two_processes(two_ranks: RankPool, tmp_path: Path, truth: dict[str, Curves]) -> None:
    two_ranks.run(run_on_rank, tmp_path)
    expect_the_truth(tmp_path, truth)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_as_a_script(world_size: int, tmp_path: Path, truth: dict[str, Curves]) -> None:
    script(world_size, example.__file__, str(tmp_path))
    expect_the_truth(tmp_path, truth)
