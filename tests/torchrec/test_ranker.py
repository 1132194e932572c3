"""examples/torchrec_ranker.py: sharded tables and uneven ranks, in two pipelines, train as one process does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from tests.support import quality_reference, reference
from tests.support.by_hand import together
from tests.support.launch import script
from tests.torchrec.one_process import RULE, Truth, run_on_ranks, train_by_hand

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # by TorchRec's and torch's own modules
    torchrec = pytest.importorskip("torchrec", reason="TorchRec needs an environment of its own")
    from examples import torchrec_ranker as example

# By TorchRec, of torch's and its own options, and by torch of an operator of fbgemm 1.8, whose gradient is tested here.
NOT_OURS = [("", FutureWarning), ("fbgemm..dense_embedding", UserWarning)]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}:{kind.__name__}") for text, kind in NOT_OURS]

PIPELINES = ["TrainPipelineBase", "TrainPipelineSparseDist"]
# Of float32 after seven steps.
CLOSE = 1e-6
Answer = tuple[list[dict[str, float]], list[dict[str, float]], dict[str, torch.Tensor], set[str]]


def run_on_rank(rank: int, pipeline: str) -> Answer:
    """Steps, logged values, the whole parameters, and the names of the sharded ones."""
    with warnings.catch_warnings():
        for text, kind in NOT_OURS:
            warnings.filterwarnings("ignore", text, kind)
        model, steps, logged = example.main(getattr(torchrec.distributed, pipeline))
        return steps, logged, *gather(model, rank)


def gather(model: torch.nn.Module, rank: int) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The parameters, on the first rank whole, and the names of the sharded ones."""
    parameters, sharded = {}, set()
    for key, value in model.state_dict().items():
        name = key.removeprefix("embeddings.embedding_bags.").removesuffix(".weight") if "bags" in key else key
        parameters[name] = value
        if isinstance(value, ShardedTensor):
            sharded.add(name)
            parameters[name] = torch.empty(value.size())
            value.gather(0, parameters[name] if rank == 0 else None)
    return parameters, sharded


@pytest.fixture(scope="module")
def truth() -> Truth:
    return train_by_hand(example)


def logged_by_hand(truth: Truth) -> list[dict[str, float]]:
    """The losses of each interval's rows, and the quality of all rows until its end."""
    found = []
    for start in range(0, len(truth.steps), example.LOG_EVERY):
        end = start + example.LOG_EVERY
        seen = truth.impressions[:end]
        rows = {task: [row for step in seen for row in step[task]] for task in example.TASKS}
        losses = reference.losses(together(truth.steps[start:end]), RULE)
        found.append({**losses, **quality_reference.result(rows)})
    return found


def close(key: str, value: float) -> Any:
    """To float32; rce, 100·(1 - ne), has lost the digits that ne has in common with 1."""
    return pytest.approx(value, rel=CLOSE, abs=100 * CLOSE if key.startswith("rce/") else None)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_weights_and_quality_are_those_of_one_process(
    world_size: int, pipeline: str, request: pytest.FixtureRequest, truth: Truth
) -> None:
    assert [len(step["like"]) for step in truth.steps] == [15] * 6 + [1]
    answers = run_on_ranks(world_size, request, run_on_rank, pipeline)
    for steps, logged, parameters, sharded in answers:
        for found, columns in zip(steps, truth.steps):
            assert found == pytest.approx(reference.losses(columns, RULE), rel=CLOSE)
        for found, oracle in zip(logged, logged_by_hand(truth)):
            assert found == {key: close(key, value) for key, value in oracle.items()}
        assert (len(steps), len(logged)) == (7, 3)
        assert sharded == {"item"}
        assert set(parameters) == set(truth.parameters)
    for name, rows in truth.parameters.items():
        trained = answers[0][2][name].reshape(len(rows), -1).double()
        torch.testing.assert_close(trained, torch.tensor(rows, dtype=torch.float64), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("world_size", [1, 2])
def test_as_a_script(world_size: int, truth: Truth) -> None:
    printed = script(world_size, example.__file__)
    expected = {
        f"step {n} {key}": x for n, values in zip([3, 6, 7], logged_by_hand(truth)) for key, x in values.items()
    }
    assert printed == pytest.approx(expected, abs=1e-4)
