"""The metrics: what update() adds and compute() gives, what happens to sums in between, and pictures of them."""
