"""A loss in a graph of torch.fx: its call is recorded when a model is traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Proxy

from twloss._torch import has_forward_hooks


def find_proxy(*inputs: object) -> Proxy | None:
    """The first torch.fx Proxy among the inputs or in one that is a mapping, or None."""
    for each in inputs:
        if isinstance(each, Proxy):
            return each
        if isinstance(each, Mapping):
            for value in each.values():
                if isinstance(value, Proxy):
                    return value
    return None


def _record_call(proxy: Proxy, module: nn.Module, method: str | None, *args: object, **kwargs: object) -> Any:
    """Record a call of a module, or of its method, in the traced graph."""
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise ValueError("logits: got a Proxy from a trace of the loss alone, expected a trace of a model that has it")
    inputs = tuple(dict(each) if isinstance(each, Mapping) else each for each in args)
    if method is None:
        return tracer.create_proxy("call_module", path, inputs, kwargs)
    return tracer.create_proxy("call_method", method, (tracer.create_proxy("get_attr", path, (), {}), *inputs), kwargs)


def record_losses(proxy: Proxy, module: nn.Module, keys: tuple[str, ...], *inputs: Any) -> dict[str, Any]:
    """Record a loss's forward in the traced graph, and return proxies by key.

    Args:
        proxy: one of the inputs, or in one of them.
        module: the loss.
        keys: of its losses; a single one is that of a ``Loss``, whose forward returns no dict.
        inputs: logits, labels, weights and normalizer.
    """
    # What a subclass's own forward, or a hook, does is in the graph already, and must not be done twice.
    is_plain = type(module).forward.__module__.startswith("twloss.") and not has_forward_hooks(module)
    *tensors, normalizer = inputs
    result = _record_call(proxy, module, None if is_plain else "_losses", *tensors, normalizer=normalizer)
    if len(keys) == 1 and is_plain:
        return {keys[0]: result}
    return {key: result[key] for key in keys}
