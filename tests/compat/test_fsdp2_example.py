"""examples/fsdp2_loop.py, on one process and on two: sharded training is that of one process with all rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from examples import fsdp2_loop as example
from tests.support import reference
from tests.support.by_hand import Truth, truth_of
from tests.support.launch import script
from tests.support.rank_pool import RankPool

EPOCHS = 2
RULE = reference.Rule()
VIEWS = "FSDP2-wrapped module .* returned a view"


def run_on_rank(rank: int) -> dict[str, float]:
    with warnings.catch_warnings():
        # What this warns of, changing one of the losses in place, autograd refuses for them.
        warnings.filterwarnings("ignore", VIEWS)
        return example.main(EPOCHS)


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], list[dict[str, float]]]:
    """Runs the example; each rank's results."""
    if request.param == 1:
        return lambda: [run_alone(tmp_path)]
    pool: RankPool = request.getfixturevalue("two_ranks")
    return lambda: pool.run(run_on_rank)


def run_alone(directory: Path) -> dict[str, float]:
    """In a process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=0, world_size=1)
    try:
        return run_on_rank(0)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def truth() -> Truth:
    return truth_of(example, EPOCHS, RULE, missing=example.MISSING)


def test_the_losses_are_those_of_one_process(run: Callable[[], list[dict[str, float]]], truth: Truth) -> None:
    for results in run():
        # The evaluation's are those of the trained parameters.
        assert results == pytest.approx(truth.results, rel=1e-12)
    assert abs(truth.averaged["loss"] / truth.results["train/loss"] - 1) > 1e-3


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.filterwarnings(f"ignore:{VIEWS}")
def test_as_a_script(world_size: int, truth: Truth) -> None:
    assert script(world_size, example.__file__) == pytest.approx(truth.results, abs=1e-6)
