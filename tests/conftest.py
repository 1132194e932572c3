"""What all tests share: one thread, a fixed seed, deterministic property tests, and the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.support.rank_pool import RankPool

# Examples on ranks wait for other processes, so a single slow one says nothing.
hypothesis.settings.register_profile("twloss", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("twloss")


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
