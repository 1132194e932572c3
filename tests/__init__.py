"""The tests: one file a stage, and one for each promise that takes several stages."""
