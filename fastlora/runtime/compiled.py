"""Compiled regions: torch.compile with one graph per static setting, shared by all layers."""

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
    """Whether to run compiled regions. "auto" means: on CUDA, but not on the CPU.

    Inside the caller's own torch.compile the answer is no: that compiles our functions itself.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" if compile == "auto" else compile


def compiled(fn: Callable[..., Any], args: tuple[Any, ...], *static: Any) -> Any:
    """fn(*args, *static), through torch.compile(fullgraph=True).

    dynamo keeps graphs per code object, and at most 8 of them. So we make a new code object for
    every combination of static arguments, grad mode, and of dtype, device, requires_grad and
    presence of each argument. Then one code object sees different shapes only, for which it makes
    one static graph and then dynamic ones, and a process may use any number of models and batches.

    Args:
        fn: a function of tensors (or trees of them) and static arguments.
        args: the tensors.
        static: hashable values that become constants of the graph.
    """
    return _region(fn, static, torch.is_grad_enabled(), tuple(_facts(x) for x in args))(*args)


def _facts(x: Any) -> tuple | None:
    """The properties of an argument that a graph depends on, without shapes.

    For a tree they are those of its first tensor. A batch of one counts, because dynamo treats
    sizes of 1 as constants. None: the argument has no tensors.
    """
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

    # The new code object also needs a new name. dynamo remembers by file, line and name which
    # floats and sizes have changed between calls. With a shared name a second model's rms_norm_eps
    # became a symbol, and recomputation inside the graph failed ("lift_tracked_freevar_to_input";
    # torch 2.11 and 2.13).
    name = f"{fn.__name__}_{_region.cache_info().misses}"
    code = region.__code__.replace(co_name=name, co_qualname=name)
    renamed = FunctionType(code, region.__globals__, fn.__name__, None, region.__closure__)
    return torch.compile(renamed, fullgraph=True, backend=backend)


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor, with its disk cache also for graphs that contain an autograd.Function.

    All our graphs contain one, and torch caches these only on request (pytorch#149751 found it
    safe). With this and the `cache_hash` of layer.py, a second process traces a layer and compiles
    nothing. We add the source of our ops to the cache key: a graph contains only their names, and
    would otherwise still be used after their code has changed.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415  half a second

    tag = torch.compiler.config.cache_key_tag + _source_of_ops()
    with (
        torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True),  # pyright: ignore
        torch.compiler.config.patch(cache_key_tag=tag),  # pyright: ignore
    ):
        return compile_fx(graph, inputs)


@cache
def _source_of_ops(folder: Path = Path(__file__).parents[1] / "ops") -> str:
    """A hash of every Python file in a folder and its sub-folders."""
    files = sorted(folder.rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
