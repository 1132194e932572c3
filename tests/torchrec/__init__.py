"""Beside TorchRec, in an environment of its own: ``constraints-torchrec.txt``."""
