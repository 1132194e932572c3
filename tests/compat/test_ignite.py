"""examples/ignite_ranker.py, on one process and on two: engine.state.metrics has the losses of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from tests.support import reference
from tests.support.by_hand import Truth, truth_of
from tests.support.launch import as_if_from_torchrun, script
from tests.support.rank_pool import on_one_or_two

with warnings.catch_warnings():
    # Ignite's metrics, at import.
    warnings.filterwarnings("ignore", r"`torch\.jit\.(script|interface)` is deprecated", DeprecationWarning)
    from ignite.engine import Engine

    from examples import ignite_ranker as example
    from twloss import GlobalLoss

EPOCHS = 2
RULE = reference.Rule(mean_over="weights")


def run_on_rank(rank: int) -> dict[str, float]:
    with as_if_from_torchrun():
        return example.main(EPOCHS)


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def run(request: pytest.FixtureRequest) -> Callable[[], list[dict[str, float]]]:
    """Runs the example; each rank's results."""
    return on_one_or_two(request, run_on_rank)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return truth_of(example, EPOCHS, RULE)


def test_the_metrics_are_those_of_one_process(run: Callable[[], list[dict[str, float]]], truth: Truth) -> None:
    for results in run():
        assert results == pytest.approx(truth.results, rel=1e-12)
    assert abs(truth.averaged["loss"] / truth.results["train/loss"] - 1) > 1e-3


def test_an_engine_that_runs_again_starts_anew() -> None:
    metric = GlobalLoss(["like"])
    engine = Engine(lambda _, batch: metric.update(torch.tensor([batch]), 1))
    example.attach(metric, engine)
    assert engine.run([1.0, 2.0, 6.0]).metrics == {"loss/like": 3.0, "loss": 3.0}
    assert engine.run([5.0]).metrics == {"loss/like": 5.0, "loss": 5.0}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_as_a_script(world_size: int, truth: Truth) -> None:
    assert script(world_size, example.__file__) == pytest.approx(truth.results, abs=1e-6)
