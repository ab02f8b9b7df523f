"""torch.compile with a cache of our own shape: one graph per static spec, shared by all layers."""

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from fastlora.runtime.tree import leaves

Compile = Literal["auto"] | bool


def compiles(compile: Compile, device: torch.device) -> bool:
    """Whether to run compiled regions: "auto" is yes on CUDA and no on the CPU.

    Never inside somebody else's torch.compile, which sees the plain functions and compiles those.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" if compile == "auto" else compile


def compiled(fn: Callable[..., Any], args: tuple[Any, ...], *static: Any) -> Any:
    """fn(*args, *static), through torch.compile(fullgraph=True).

    dynamo hangs its graphs, and its limit of 8 of them, on the code object. So every combination of
    facts other than shape (static arguments, grad mode, which optional arguments are there, dtype,
    device, requires_grad, a batch of one) gets a code object of its own: a process may hold any
    number of models and mix any batches, and one code object sees at most a static graph, then
    dynamic ones.
    """
    return _region(fn, static, torch.is_grad_enabled(), tuple(_facts(x) for x in args))(*args)


def _facts(x: Any) -> tuple | None:
    """What a graph specialises on in one argument, shapes apart; of a tree, in its first leaf."""
    first = next((leaf for leaf in leaves(x) if isinstance(leaf, Tensor)), None)
    if first is None:
        return None
    return first.dtype, first.device, first.requires_grad, first.dim() > 1 and first.shape[0] == 1


@cache
def _region(
    fn: Callable[..., Any], static: tuple[Any, ...], grad: bool, facts: tuple
) -> Callable[..., Any]:
    def region(*args):
        return fn(*args, *static)

    # Another object under another name: dynamo remembers by file, line and name which floats and
    # sizes have changed. Shared, a second model's rms_norm_eps became a symbol, and recomputation
    # inside the graph failed ("lift_tracked_freevar_to_input"; torch 2.11 and 2.13).
    own_name = f"{fn.__name__}_{_region.cache_info().misses}"
    code = region.__code__.replace(co_name=own_name, co_qualname=own_name)
    own = FunctionType(code, region.__globals__, fn.__name__, None, region.__closure__)
    return torch.compile(own, fullgraph=True, backend=backend)


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor, which takes graphs with an autograd.Function into its cache on disk too.

    All of ours have one, and torch leaves those out unless asked (pytorch#149751 found it safe);
    with recompute.py's `cache_hash` a second process then traces a layer, and compiles nothing. The
    key holds our ops' source: a graph sees their names alone, and would outlive a change in them.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415  half a second

    tag = torch.compiler.config.cache_key_tag + _source_of_ops()
    with (
        torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True),  # pyright: ignore
        torch.compiler.config.patch(cache_key_tag=tag),  # pyright: ignore
    ):
        return compile_fx(graph, inputs)


@cache
def _source_of_ops() -> str:
    files = sorted((Path(__file__).parents[1] / "ops").rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
