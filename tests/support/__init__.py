"""What tests share: the oracles, which know nothing of the package, batches, real ranks and launchers."""
