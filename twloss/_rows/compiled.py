"""A function of tensors, compiled: once for each set of constants and of dtypes, whatever the number of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def run_compiled(
    function: Callable[..., Any], constants: tuple[Any, ...], *inputs: Any, threads: int | None = None
) -> Any:
    """Call ``function(*constants, *inputs)`` compiled.

    Args:
        function: of tensors.
        constants: hashable; each distinct tuple is compiled separately.
        inputs: tensors, None and numbers that may change.
        threads: of compiled code on a CPU; None: those of torch.

    Raises:
        RuntimeError: where torch.compile fails.
    """
    try:
        dtypes = tuple([getattr(each, "dtype", None) for each in inputs])
        return _compiled(function, constants, dtypes, threads)(*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first, *_ = f"{error}\n".splitlines()
        raise RuntimeError(
            "fused: got True where torch.compile fails, expected what it needs, a C++ compiler for tensors on a CPU "
            f"and Triton for those on a GPU, or fused=False: {type(error).__name__}: {first}"
        ) from error


@functools.cache
def _compiled(
    function: Callable[..., Any], constants: tuple[Any, ...], _: tuple[torch.dtype | None, ...], threads: int | None
) -> Callable[..., Any]:
    """The function on inputs of these dtypes, which is compiled when it is called, for any number of rows."""

    def run(*inputs: Any) -> Any:
        return function(*constants, *inputs)

    # Of one code object torch compiles no more than eight forms, and then none at all, so each has one of its own.
    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(own, dynamic=True, options=None if threads is None else {"cpp.threads": threads})
