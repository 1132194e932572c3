"""Frameworks: the examples, run on one process and on two, against the same training by hand."""
