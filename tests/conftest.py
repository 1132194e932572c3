"""What all tests share: the tiers, two workers, one thread, a fixed seed, the compiler's back end, and the ranks."""

from __future__ import annotations

import gc
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import compiler, tiers
from tests.support.progress import Progress
from tests.support.rank_pool import RankPool
from twloss._rows import row_pass, task_group
from twloss._rows.row_pass import Plan
from twloss._sums.sums import BatchSums


def pytest_configure(config: pytest.Config) -> None:
    """Choose the tier, and one cache of generated code for the workers, their ranks and all that they start."""
    tiers.choose_examples(config)
    compiler.use(compiler.AOT_EAGER)
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.cache.mkdir("inductor")))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Show the files that are done, where workers run the tests."""
    config = session.config
    if config.getoption("numprocesses", None) and config.option.verbose == 0:
        config.pluginmanager.register(Progress(config.pluginmanager.getplugin("terminalreporter")))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two, on any machine, since each has ranks of its own; none for files by name, which start sooner without."""
    return 0 if all(Path(arg.partition("::")[0]).is_file() for arg in config.args) else 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Property tests are in both tiers; files that take long go first, so that no worker ends with one alone."""
    seconds: dict[Path, float] = defaultdict(float)
    for item in items:
        if tiers.is_property(item) and tiers.is_exhaustive():
            item.add_marker(tiers.EXHAUSTIVE)
        if tiers.is_asked_for(item):
            seconds[item.path] += tiers.rough_seconds(item)
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the collector what the imports have made, which it would look through again and again."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def inductor() -> Iterator[None]:
    """Compile with inductor, where other tests stop at the graphs."""
    with compiler.inductor():
        yield


@pytest.fixture(params=[False, True], ids=["eager", "fused"])
def eager_and_fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, and once with ``fused=True`` in every loss that can have it."""
    if not request.param:
        return
    original = row_pass.sum_batch

    def sum_batch(plan: Plan, *args: Any, **kwargs: Any) -> BatchSums:
        return original(plan._replace(fused=True), *args, **kwargs)

    monkeypatch.setattr(task_group, "sum_batch", sum_batch)


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
