"""Sums that live: torchmetrics ``Metric``s of running sums."""
