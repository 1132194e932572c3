"""Every private name of torch and torchmetrics in use, with the reason and what is lost without it; workarounds too.

Nothing private of theirs is called anywhere else. ``OVERRIDDEN`` lists those that our metrics override or read instead
of calling: what a subclass has to reach.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

Kind = TypeVar("Kind", bound=type)

OVERRIDDEN = {
    "_wrap_update": "Its wrapper counts updates in a Python attribute, at which torch.compile recompiles at each step.",
    "_wrap_compute": "Its wrapper swaps the state for that of all ranks, so an update in another thread is lost.",
    "_sync_dist": "A manual sync() would take three collectives instead of one.",
    "_copy_state_dict": "A sync() in inference_mode would leave sums that training can't update.",
    "_reduce_states": "merge_state() would add windows that are not aligned, and could not add pairs of float32.",
    "_apply": "A cast of the model would round the sums and the zeros that reset() restores.",
    "_load_from_state_dict": "A tensor under a state's name would be loaded without a look at what it is of.",
    "_is_synced": "An update between sync() and unsync() would be lost without a word.",
    "_defaults": "reset() would bring the sums back to the device that they were made on.",
    "_device": "metric.device would stay what it was.",
    "_modules": "A loss would ask nn.Module for its metrics by two calls of Python at each step.",
    "_slow_forward": "torch.jit.trace, which alone calls it, would make the number of rows a constant.",
    "_replicate_for_data_parallel": "nn.DataParallel would add rows to replicas, which it drops after each forward.",
    "_forward_hooks": "In a graph of torch.fx a loss's hooks would run twice.",
    "_forward_pre_hooks": "As for those above.",
    "_forward_cache": "MetricCollection and Lightning read there what forward() gave.",
    "_filter_kwargs": "A view in a MetricCollection would get the arguments of all its metrics.",
    "_plot": "torchmetrics' own picture, of which plot() changes a few lines.",
}


def hidden_from_jit(cls: Kind) -> Kind:
    """Hide a class's annotations and properties from torch.jit, for models that are scripted and do not call it.

    Scripting a model reads both in every module of it. It does not know the types of our annotations, and can't compile
    our properties.
    """
    cls.__annotations__ = {}
    names = [name for name in dir(cls) if isinstance(inspect.getattr_static(cls, name), property)]
    cls.__jit_unused_properties__ = names  # type: ignore[attr-defined]
    return cls


def split_last(values: Sequence[Any]) -> tuple[Sequence[Any], Any]:
    """All values but the last, and the last; torch 2.6 to 2.8 can't compile a slice of a NamedTuple."""
    return tuple(values)[:-1], values[-1]


def is_transformed(*inputs: object) -> bool:
    """Whether torch.func or torch.export transforms this call, or forward-mode differentiation goes through an input.

    There is no public way to ask for the transforms; without it they fail at the first update in place of a tensor from
    outside. The compiler can't trace the question about forward mode, and outside of its levels there is none. What is
    exported is differentiated, and run, by others any number of times; torch 2.6 can't tell it from what is compiled.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
    if forward_ad._current_level < 0:
        return False
    for values in inputs:  # noqa: SIM110 (a generator is entered anew at each input)
        if isinstance(values, Tensor) and forward_ad.unpack_dual(values).tangent is not None:
            return True
    return False


def runs_compiled(values: Tensor) -> bool:
    """Whether compiled code can be run on a tensor here and now.

    A first call within a dispatch mode, such as a counter of operators, would have it never compiled in this process.
    There is no public way to ask for the mode. The compiler has no second one in it.
    """
    if torch.compiler.is_compiling():
        return False
    is_plain = type(values) in (Tensor, nn.Parameter) and not values.is_meta
    return is_plain and not torch._C._len_torch_dispatch_stack()


def refuse_trace(module: nn.Module) -> None:
    """Raise within torch.jit.trace, for which there is no public question that the compiler and mypy know."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            f"torch.jit.trace: got a call of a {type(module).__name__}, whose number of rows a trace would make a "
            "constant, expected a forward without one, or torch.export.export"
        )


def plain_tensors() -> AbstractContextManager[object]:
    """A context in which new tensors are plain, for state that outlives it.

    Those of inference_mode can't be updated in training, and those of a torch.func transform not at all. There is no
    public way to leave a transform; without it no loss could be made, nor a metric reset, within one.
    """
    plain = torch.inference_mode(False)
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return plain
    stack = ExitStack()
    stack.enter_context(plain)
    stack.enter_context(temporarily_clear_interpreter_stack())
    return stack


def tensor_of(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.tensor``; in FakeTensorMode, where nothing has a value, an empty tensor.

    There, deep copies of tensors corrupt memory once one was made of numbers (torch 2.13), and ``Metric`` copies its
    states deeply. There is no public way to ask for the mode.
    """
    if _has_no_values():
        return torch.empty(len(numbers), dtype=dtype, device=device)
    if len(numbers) == 1:  # by a kernel: a copy of numbers from Python makes a GPU's host wait
        return torch.full((1,), numbers[0], dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, device=device)


def crc32_of(values: Tensor) -> int:
    """The CRC-32 of a tensor's bytes ``(bytes,)`` on the CPU; 0 in FakeTensorMode, where they have no values."""
    return 0 if _has_no_values() else zlib.crc32(values.numpy().tobytes())


def _has_no_values() -> bool:
    return not torch.compiler.is_compiling() and bool(torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE))


def is_valueless(values: Tensor, state: Tensor) -> bool:
    """Whether a tensor has no values that a state could take: one of a meta device, or a fake one beside a real state.

    There is no public way to ask for those of FakeTensorMode and of an export, in which no state may stay.
    """
    return values.is_meta or (type(values) is not type(state) and is_fake(values) and not is_fake(state))


def is_batch_of_gradients(grad: Tensor) -> bool:
    """Whether torch.vmap, or autograd's older ``is_grads_batched``, runs a backward for many gradients at once.

    There is no public way to ask; without it such a backward fails at its first operation in place. The compiler can't
    trace the question, nor such a backward.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad)


def scaled_sigmoid(scale: Tensor, values: Tensor, beta: float, threshold: float) -> Tensor:
    """``scale·σ(beta·values)`` to the last digits for any value, in one kernel; beyond the threshold, σ is 1.

    It is the gradient of softplus, an operator that has no public function; ``sigmoid`` takes three kernels.
    """
    result: Tensor = torch.ops.aten.softplus_backward(scale, values, beta, threshold)
    return result


def weigh(values: Tensor, weights: Tensor | None) -> Tensor:
    """``values * weights``, and exactly 0 where the weight is 0, NaN and infinity included; so too for the gradient.

    A product would not do (0·NaN is NaN), and ``where(weights == 0, 0, values)`` takes several times as long. The
    gradient of a threshold, an operator that has no public function, is this selection in one kernel, differentiable
    any number of times, and keeps the values at weights of NaN. (That of hardshrink, which needs no ``abs``, does so at
    some places of a vector and not at others.) The compiler fuses the plain form.
    """
    if weights is None:
        return values
    if torch.compiler.is_compiling():
        return (values * weights).where(weights != 0, 0.0)
    weighted: Tensor = torch.ops.aten.threshold_backward(values * weights, weights.abs(), 0.0)
    return weighted


def weigh_(values: Tensor, weights: Tensor | None) -> Tensor:
    """``weigh`` in place, where nothing is differentiated; what is compiled has no place."""
    if torch.compiler.is_compiling():
        return weigh(values, weights)
    if weights is not None:
        values.mul_(weights)
        torch.ops.aten.threshold_backward.grad_input(values, weights.abs(), 0.0, grad_input=values)
    return values


def mask(values: Tensor, weights: Tensor, *, in_place: bool = False) -> Tensor:
    """The values, and exactly 0 where the weight is 0, by the selection of ``weigh``."""
    if torch.compiler.is_compiling():
        return values.where(weights != 0, 0.0)
    if in_place:
        torch.ops.aten.threshold_backward.grad_input(values, weights.abs(), 0.0, grad_input=values)
        return values
    masked: Tensor = torch.ops.aten.threshold_backward(values, weights.abs(), 0.0)
    return masked


def define_operator(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> tuple[torch.library.Library, Callable[..., Any]]:
    """Define a function as an operator, which is there for as long as the library that is returned beside it.

    A module may be imported anew while what it was before is in use, and its operator is then another one.

    Args:
        schema: its name, arguments and results.
        function: what it does, on any device.
        fake: the same of tensors without values; None: the function.
    """
    # Not torch.library.custom_op: its checks at run time cost a compiled step 60 µs.
    library, (name, _, arguments) = torch.library.Library("twloss", "FRAGMENT"), schema.partition("(")
    while hasattr(torch.ops.twloss, name):
        name += "_"
    library.define(f"{name}({arguments}")
    library.impl(name, function, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"twloss::{name}", fake, lib=library)
    return library, getattr(torch.ops.twloss, name)


def tile(values: Tensor, repeats: int) -> Tensor:
    """Values ``(tasks,)`` so many times over.

    In code that is compiled for a CPU they are scattered into a tensor of their own. The compiler would otherwise look
    up each number where it is used, by the remainder of its place, which fills no vector and takes three times as long
    as the loss. (``as_strided`` would do on a CPU, and gives wrong numbers on a GPU with torch 2.11.)
    """
    if repeats == 1:
        return values
    tiled = values.repeat(repeats)
    if torch.compiler.is_compiling() and values.is_cpu:
        places = torch.arange(tiled.shape[0], device=values.device)
        return tiled.scatter(0, places, tiled)
    return tiled


def unwrapped(function: Any) -> Any:
    """The module in the wrappers of torch.compile and DistributedDataParallel; anything else as it is.

    Without it the parameters of its forward would not be seen. Other tensors in its place would have it compiled again,
    and a copy of DDP's wrapper hooks into the gradients of the parameters. That of torch.compile has no public name.
    """
    while True:
        inner = getattr(function, "_orig_mod", function)
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
        if inner is function:
            return inner
        function = inner


def copy_to_call(module: nn.Module, values: dict[int, Tensor], argument: str) -> nn.Module:
    """A deep copy of a module, with other parameters and buffers.

    It shares process groups, which can't be copied and do not change. FSDP2's modules refuse to be copied, and the
    hooks by which it gathers parameters would put those of the time of the call in place of those that are given; there
    is no public way to leave them out.

    Args:
        module: with attributes of its own, to any depth.
        values: those of its parameters and buffers, by the ids of these.
        argument: the name of the argument that it is, for the error.

    Raises:
        TypeError: for a module that can't be copied.
    """
    memo: dict[int, Any] = {**values}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(values[id(parameter)], requires_grad=False)
    sharded = [each for each in module.modules() if any(map(_is_distributed, _forward_hooks_of(each)))]
    memo |= {id(each): object.__new__(type(each)) for each in sharded}
    for each in module.modules():
        for name, value in vars(each).items():
            if name.startswith("__composable_api") or hasattr(value, "group_name"):
                memo[id(value)] = value
            elif isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()  # with a graph it could not be copied either
    try:
        for each in sharded:
            state = each.__getstate__()
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                kept = [item for item in state[name].items() if not _is_distributed(item[1])]
                state[name] = type(state[name])(kept)
            memo[id(each)].__setstate__(copy.deepcopy(state, memo))
        twin: nn.Module = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"{argument}: got a module that can't be copied ({type(error).__name__}: {error}), expected one that "
            "copy.deepcopy() takes, as compute_async() does; compute() needs no copy"
        ) from error
    return twin


def _forward_hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _is_distributed(hook: Any) -> bool:
    """Whether a hook is one of torch.distributed's own."""
    return str(getattr(hook, "__module__", None)).startswith("torch.distributed")


def takes_keyword(function: Any, name: str) -> bool:
    """Whether a callable has a parameter of this name, to be given as a keyword."""
    function = unwrapped(function)
    try:
        # The signature of a module itself is (*args, **kwargs).
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # builtins and operators have none
        return False
    return name in parameters and parameters[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a call of it runs hooks, which torch.fx traces too; there is no public way to ask."""
    return bool(_forward_hooks_of(module))


def assert_async(condition: Tensor, message: str) -> None:
    """Raise a RuntimeError unless a bool on a device is true: at once on a CPU, on others when the device gets there.

    torch has no public assertion that does not wait for the device.
    """
    torch._assert_async(condition, message)


def process_group_named(name: str) -> dist.ProcessGroup | None:
    """The process group of this process that has a name; None if there is none.

    torch's own functional collectives resolve names by it; without it a copy of a metric would lose its group.
    """
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    except RuntimeError:
        return None
