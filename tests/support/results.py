"""Feeding a metric, and its result in Python floats beside the oracle's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torchmetrics import Metric

from tests.support import quality_reference

AnyMetric = TypeVar("AnyMetric", bound=Metric)


def fed(metric: AnyMetric, batches: Iterable[Iterable[Any]]) -> AnyMetric:
    """The metric, after these updates."""
    for batch in batches:
        metric.update(*batch)
    return metric


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """A result in Python floats."""
    return {key: value.item() for key, value in values.items()}


def assert_close(found: Mapping[str, float], oracle: Mapping[str, float], tolerance: float = 1e-12) -> None:
    """Fail with both results where they differ."""
    assert quality_reference.close(found, oracle, tolerance), f"got {found}, expected {dict(oracle)}"
