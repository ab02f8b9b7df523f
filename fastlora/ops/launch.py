"""Launching Triton kernels, and finding the launches of an op before it runs.

Triton compiles a kernel at its first launch, for the types of its arguments, for which numbers and
addresses are multiples of 16, and for its constants. An op's implementation decides all of these by
the shapes, strides and types of the op's tensors. So `launches_of` runs the implementation on
tensors without data (FakeTensors), and `launch` then notes the kernel and its arguments.
runtime/kernels_ahead.py compiles the kernels that are found.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Pointer:
    """What Triton reads of a tensor when it compiles."""

    dtype: torch.dtype
    address: int  # in bytes from the begin of the tensor's memory, which torch aligns

    def data_ptr(self) -> int:
        return self.address


class Launch(NamedTuple):
    """A launch of a kernel, without its grid."""

    kernel: Any  # triton.JITFunction
    args: tuple[Any, ...]  # a Pointer in place of each tensor; Triton's descriptors stay
    options: dict[str, Any]  # constants and the compiler's options, by name

    def key(self) -> tuple:
        """Equal for launches that need the same compiled kernel."""
        return self.kernel, repr(self.args), repr(self.options)


# Products and sums become one instruction (fused multiply-add). Triton 3.9 warns of a launch that
# leaves this open, and says that 3.10 will have the other default.
_DEFAULTS = {"enable_fp_fusion": True}

_found: ContextVar[list[Launch] | None] = ContextVar("fastlora_launches", default=None)
_implementations: dict[str, Callable[..., Any]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), on the GPU of the first tensor among the arguments. Inside
    `launches_of` it only notes the launch."""
    options = _DEFAULTS | options
    if (found := _found.get()) is not None:
        found.append(Launch(kernel, _pointers(args), options))
        return
    with torch.cuda.device_of(next(x for x in args if isinstance(x, Tensor))):
        kernel[grid](*args, **options)  # Triton launches on the current device


def pdl_options(x: Tensor, pdl: bool | None = None) -> dict[str, Any]:
    """The options of a launch that may begin while the kernel before it still runs (programmatic
    dependent launch, PDL). None: if x's GPU can, which is sm_90 and later."""
    if pdl is None:
        pdl = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return dict(PDL=pdl, launch_pdl=pdl)


def _pointers(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_pointer(x) for x in args)


def _pointer(x: Any) -> Any:
    if isinstance(x, tuple):
        return _pointers(x)
    return Pointer(x.dtype, int(x.storage_offset()) * x.itemsize) if isinstance(x, Tensor) else x


def implement(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an op's implementation on all devices.

    Like torch.library.impl, but `launches_of` finds the function too.

    Args:
        op: name of a defined op, "fastlora::...".
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.impl(op, "CompositeExplicitAutograd")(function)
        _implementations[op] = function
        return function

    return register


def implementation(op: str) -> Callable[..., Any] | None:
    """The function that `implement` registered for an op, if there is one."""
    return _implementations.get(op)


def launches_of(function: Callable[..., object], *args: Any) -> list[Launch]:
    """The launches of function(*args). Nothing is launched.

    Args:
        function: an op's `implementation`, or a function that calls `launch`.
        args: its arguments; FakeTensors in place of tensors, and no symbolic sizes. Their mode must
            be active, so that tensors that the function makes have no data either.
    """
    token = _found.set(found := [])
    try:
        with _Implementations():
            function(*args)
    finally:
        _found.reset(token)
    return found


class _Implementations(TorchDispatchMode):
    """Runs the implementations of ops that are called with FakeTensors, and not only their
    declared results."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function := implementation(func.name()):
            with self:
                return function(*args, **kwargs or {})
        return func(*args, **kwargs or {})
