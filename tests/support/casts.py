"""The ways in which a model is cast, none of which may round what is summed in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.float16),
    "_apply": lambda m: m._apply(lambda t: t.to(torch.float16)),
}
