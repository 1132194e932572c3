"""A loss in a graph of torch.fx: its call is recorded when a model is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Proxy

from twloss._torch import has_forward_hooks


def find_proxy(*inputs: object) -> Proxy | None:
    """The first torch.fx Proxy among the inputs, in one that is a mapping, or in a pair of that; or None."""
    for each in inputs:
        if isinstance(each, Proxy):
            return each
        if isinstance(each, (Mapping, tuple, list)):
            proxy = find_proxy(*(each.values() if isinstance(each, Mapping) else each))
            if proxy is not None:
                return proxy
    return None


def record_forward(
    proxy: Proxy, module: nn.Module, keys: tuple[str, ...], *inputs: object, **options: object
) -> dict[str, Any]:
    """Record a loss's forward in the traced graph, and return proxies by key.

    Args:
        proxy: one of the inputs, or in one of them.
        module: the loss.
        keys: of its losses; a single one is that of a ``Loss``, whose forward returns no dict.
        inputs: the tensors of a batch.
        options: the other arguments; None: left out.
    """
    # What a subclass's own forward, or a hook, does is in the graph already, and must not be done twice.
    is_plain = type(module).forward.__module__.startswith("twloss.") and not has_forward_hooks(module)
    if not is_plain:
        return record_losses(proxy, module, "_losses", keys, *inputs, **options)
    result = _record_call(proxy, module, None, *inputs, **options)
    return {key: result if len(keys) == 1 else result[key] for key in keys}


def record_losses(
    proxy: Proxy, module: nn.Module, method: str, keys: tuple[str, ...], *inputs: object, **options: object
) -> dict[str, Any]:
    """Record a call of a loss's method that returns its losses by key; all else as ``record_forward``."""
    result = _record_call(proxy, module, method, *inputs, **options)
    return {key: result[key] for key in keys}


def _record_call(proxy: Proxy, module: nn.Module, method: str | None, *inputs: object, **options: object) -> Any:
    """Record a call of a module, or of its method, in the traced graph."""
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise ValueError("logits: got a Proxy from a trace of the loss alone, expected a trace of a model that has it")
    args = tuple(dict(each) if isinstance(each, Mapping) else each for each in inputs)
    kwargs = {
        name: dict(each) if isinstance(each, Mapping) else each for name, each in options.items() if each is not None
    }
    if method is None:
        return tracer.create_proxy("call_module", path, args, kwargs)
    return tracer.create_proxy("call_method", method, (tracer.create_proxy("get_attr", path, (), {}), *args), kwargs)
