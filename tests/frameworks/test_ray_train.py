"""examples/ray_train.py, on one worker and on two: the losses and the parameters are those of one process by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import reference
from tests.support.by_hand import Columns, HandRanker, Rows, mean_of_means, together
from tests.support.patience import SECONDS

pytest.importorskip("ray", reason="needs the extra ray; see constraints-frameworks.txt")

import ray

from examples import ray_train as example

# Ray's own, of its settings.
pytestmark = pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning")

EPOCHS = 3
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own limit is 60 seconds, which a busy machine may take.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{SECONDS:.0f}",
    "GLOO_SOCKET_IFNAME": "lo",
}


@pytest.fixture(scope="module", autouse=True)
def _a_ray_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray that writes into a folder of the test run; it starts as slowly as it trains."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": SETTINGS})
        yield
        ray.shutdown()


@pytest.mark.parametrize("workers", [1, 2])
def test_losses_and_parameters_are_those_of_one_process(workers: int) -> None:
    torch.manual_seed(0)
    data = Rows.of(*example.rows())
    ranker = HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.5, missing=example.MISSING)
    seen: list[Columns] = []
    for _ in range(EPOCHS):
        seen = [ranker.step(batch) for batch in data.batches(example.GLOBAL_BATCH)]
    losses, averaged = reference.losses(together(seen), reference.Rule()), mean_of_means(seen, reference.Rule())

    answer = example.main(workers, EPOCHS)

    assert answer["losses"] == pytest.approx(losses, rel=1e-12)
    state = answer["state"]
    parameters = [*(value for row in state["heads.weight"] for value in row), *state["heads.bias"]]
    assert parameters == pytest.approx(ranker.parameters(), rel=1e-12, abs=1e-12)
    assert abs(averaged["loss"] / losses["loss"] - 1) > 1e-3
