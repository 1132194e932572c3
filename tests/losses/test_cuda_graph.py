"""A step that is captured in a CUDA graph: each replay counts, and no reset() leaves its memory behind."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from examples.cuda_graph import main
from tests.support.gpu import needs_a_gpu
from twloss import GlobalLoss, MultiTaskLoss
from twloss._sums import running_sums

TASKS = ["a", "b"]


def reset(metric: GlobalLoss) -> None:
    metric.reset()


def load(metric: GlobalLoss) -> None:
    metric.persistent(True)
    saved = copy.deepcopy(metric.state_dict())
    metric.update(torch.tensor([5.0, 5.0]), 1)
    metric.load_state_dict(saved)


def merge(metric: GlobalLoss) -> None:
    metric.merge_state(copy.deepcopy(metric))


def forward(metric: GlobalLoss) -> None:
    metric(torch.tensor([5.0, 5.0]), 1)


CHANGES: list[Callable[[GlobalLoss], None]] = [reset, load, merge, forward]


@pytest.mark.parametrize("change", CHANGES)
def test_from_a_capture_on_the_sums_change_in_place(
    change: Callable[[GlobalLoss], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The naive version replaces the tensor, and a replay then writes to memory that is another's by now."""
    metrics = []
    for is_captured in (False, True):
        monkeypatch.setattr("twloss._metrics.kept_metric.is_captured", lambda _, yes=is_captured: yes)
        metric = GlobalLoss(TASKS)
        metric.update(torch.tensor([1.0, 2.0]), 4)
        before = metric.totals
        change(metric)
        assert (metric.totals is before) == is_captured
        metrics.append(metric)
    assert torch.equal(metrics[0].totals, metrics[1].totals)


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a step and what the step returned in it; three steps come first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def test_an_address_is_forgotten_with_its_memory() -> None:
    metric = GlobalLoss(TASKS)
    address = metric.totals.data_ptr()
    running_sums._note_capture(metric.totals.detach())  # compiled code may be given an alias
    assert address in running_sums._CAPTURED
    del metric
    gc.collect()
    assert address not in running_sums._CAPTURED


@needs_a_gpu
@pytest.mark.parametrize("way", ["eager", "fused", "compiled"])
def test_each_replay_counts(way: str) -> None:
    options: dict[str, Any] = {"pos_weights": [2.0, 3.0], "quality": True, "fused": way == "fused"}
    loss, twin = (MultiTaskLoss("bce_with_logits", TASKS, **options).to("cuda") for _ in range(2))
    run = torch.compile(loss, fullgraph=True) if way == "compiled" else loss
    logits = torch.randn(64, 2, device="cuda", requires_grad=True)
    labels, weights = torch.rand(64, 2, device="cuda"), torch.rand(64, 2, device="cuda")

    def step() -> Any:
        logits.grad = None
        result = run(logits, labels, weights)
        result["loss"].backward()
        return result, logits.grad

    graph, (result, gradient) = capture(step)
    loss.train_metric.reset()
    loss.train_quality.reset()
    for _ in range(3):
        with torch.no_grad():
            logits.normal_()
        graph.replay()
        logits.grad = None
        expected = twin(logits, labels, weights)
        expected["loss"].backward()
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradient, logits.grad)
    for ours, theirs in ((loss.train_metric, twin.train_metric), (loss.train_quality, twin.train_quality)):
        assert ours.update_count == theirs.update_count == 3
        torch.testing.assert_close(ours.compute(), theirs.compute())


@needs_a_gpu
def test_a_forward_of_the_metric_is_captured_and_breaks_no_capture() -> None:
    metric, sums = GlobalLoss(TASKS).to("cuda"), torch.tensor([1.0, 2.0], device="cuda")
    graph, _ = capture(lambda: metric(sums, 1))
    metric.reset()
    for _ in range(3):
        graph.replay()
    metric(sums, 1)
    graph.replay()
    assert metric.update_count == 5


@needs_a_gpu
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert "nan" not in capsys.readouterr().out
