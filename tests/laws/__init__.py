"""The two laws: sums over any split of the rows, and exact gradients, on one process and on real ranks."""
