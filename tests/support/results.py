"""Feeding a metric, and its result in Python floats beside the oracle's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from tests.support import quality_reference

# The oldest torchmetrics that is supported; merge_state came later.
IS_TORCHMETRICS_1_0 = not hasattr(Metric, "merge_state")

AnyMetric = TypeVar("AnyMetric", bound=Metric)


def fed(metric: AnyMetric, batches: Iterable[Iterable[Any]]) -> AnyMetric:
    """The metric, after these updates."""
    for batch in batches:
        metric.update(*batch)
    return metric


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """A result in Python floats."""
    return {key: value.item() for key, value in values.items()}


def compute_each(collection: MetricCollection) -> dict[str, Tensor]:
    """The results of a collection's metrics, whose keys may be the same.

    Of those torchmetrics 1.0.3 keeps the last one's alone, and so each metric is asked itself.
    """
    if IS_TORCHMETRICS_1_0:
        return joined({name: metric.compute() for name, metric in collection.items(keep_base=True)})
    found: dict[str, Tensor] = collection.compute()
    return found


def forward_each(collection: MetricCollection, *batch: Any) -> dict[str, Tensor]:
    """What forward() of a collection gives, in the same way."""
    found: dict[str, Tensor] = collection(*batch)
    if IS_TORCHMETRICS_1_0:
        return joined({name: metric._forward_cache for name, metric in collection.items(keep_base=True)})
    return found


def joined(results: Mapping[str, Any]) -> dict[str, Tensor]:
    """As torchmetrics 1.9 names them."""
    found: dict[str, Tensor] = {}
    for name, result in results.items():
        of_keys = result if isinstance(result, dict) else {"": result}
        found |= {f"{name}_{key}".removesuffix("_"): value for key, value in of_keys.items()}
    return found


def assert_close(found: Mapping[str, float], oracle: Mapping[str, float], tolerance: float = 1e-12) -> None:
    """Fail with both results where they differ."""
    assert quality_reference.close(found, oracle, tolerance), f"got {found}, expected {dict(oracle)}"
