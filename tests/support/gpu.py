"""Tests that need a GPU say so where there is none."""

from __future__ import annotations

import pytest
import torch

__all__ = ["needs_a_gpu"]

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
