"""From sums to losses: everything of the size ``(sums, tasks)``."""
