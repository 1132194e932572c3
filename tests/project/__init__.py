"""The repository itself: the README, documentation, types, archives, benchmarks and the demo."""
