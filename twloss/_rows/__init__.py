"""From the caller's tensors to sums: everything of the size of a batch."""
