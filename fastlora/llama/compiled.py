"""torch.compile with a cache of our own shape: one graph per static spec, shared by all layers."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch

from fastlora.llama.spec import Compile


def compiles(compile: Compile, device: torch.device) -> bool:
    """Whether to run compiled regions: "auto" is yes on CUDA and no on the CPU.

    Never inside somebody else's torch.compile, which sees the plain functions and compiles those.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" if compile == "auto" else compile


@cache
def compiled(fn: Callable[..., Any], *static: Any, grad: bool) -> Callable[..., Any]:
    """torch.compile(fullgraph=True) of `fn` with `static` as its last arguments.

    dynamo hangs its graphs, and its limit of 8 of them, on the code object. So each (fn, static,
    grad mode) gets a code object of its own: a process may hold any number of models, and only new
    shapes count toward the limit. Those go static first, then dynamic.
    """

    def region(*args):
        return fn(*args, *static)

    code = region.__code__.replace()  # a copy: another object, equal in everything
    own = FunctionType(code, region.__globals__, fn.__name__, None, region.__closure__)
    return torch.compile(own, fullgraph=True)
