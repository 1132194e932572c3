"""What all tests share: two workers, one thread, a fixed seed, deterministic property tests, and the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.support.rank_pool import RankPool
from twloss import _bce, _losses
from twloss._bce import Sums

# Examples on ranks wait for other processes, so a single slow one says nothing.
hypothesis.settings.register_profile("twloss", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("twloss")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two, on any machine, since each has ranks of its own; none for files by name, which start sooner without."""
    return 0 if all(Path(arg.partition("::")[0]).is_file() for arg in config.args) else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that none is left to one worker while the other has nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def new_compiler() -> Iterator[None]:
    """A compiler that has seen nothing, and whose own warnings are no errors."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.fixture(params=[pytest.param(False, id="eager"), pytest.param(True, id="fused", marks=pytest.mark.slow)])
def eager_and_fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, and once with ``fused=True`` in every loss that can have it."""
    if not request.param:
        return
    original = _bce.sum_bce

    def sum_bce(*args: Any, **kwargs: Any) -> Sums:
        return original(*args, **{**kwargs, "fused": True})

    monkeypatch.setattr(_losses, "sum_bce", sum_bce)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two gloo ranks."""
    pool = RankPool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[RankPool]:
    """Three gloo ranks."""
    pool = RankPool(3)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four gloo ranks."""
    pool = RankPool(4)
    yield pool
    pool.stop()


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    """Two, then three gloo ranks."""
    pool = request.getfixturevalue({2: "two_ranks", 3: "three_ranks"}[request.param])
    assert isinstance(pool, RankPool)
    return pool
