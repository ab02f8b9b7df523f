"""Compiled regions: torch.compile with one graph per static setting, shared by all layers."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from fastlora.runtime.devices import device_of
from fastlora.runtime.kernels_ahead import compiling_kernels

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
    every combination of static arguments and of the properties that dynamo guards on (`_facts`,
    `_modes`). Then one code object sees different sizes only, for which it makes one static graph
    and then dynamic ones. If sizes that vary one by one need more than 8, a new code object takes
    over. So a process may use any number of models, trained tensors and batches.

    Args:
        fn: a function of tensors (or trees of them) and static arguments.
        args: the tensors; the first is not a tree.
        static: hashable values that become constants of the graph.
    """
    return _region(fn, static, _modes(args[0].device.type), _facts(args))(*args)


def _modes(device_type: str) -> tuple:
    """The settings of torch that dynamo guards on in every graph."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    )


def _facts(args: tuple[Any, ...]) -> tuple:
    """The properties of a tree that a graph depends on, without sizes other than 1.

    dynamo guards on the class, length and keys of every node; on the class, dtype, device and
    layout of every tensor, and on whether it requires a gradient; on which tensors are the same
    object. It treats sizes of 1 as constants. For a layer with LoRA everywhere (26 tensors) this
    takes 30 us on a busy host, and its calls some 1.5 ms.
    """
    facts, tensors, nodes = [], [], [args]
    for x in nodes:  # the loop reaches the nodes that it appends
        facts.append(type(x))
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, dict):
            facts += (len(x), *x)
            nodes += x.values()
        elif isinstance(x, tuple | list):
            facts.append(len(x))
            nodes += x
    facts += [x.dtype for x in tensors]
    facts.append(tensors[0].device)
    facts += [x.get_device() for x in tensors]  # the index; it costs less than x.device
    facts += [x.requires_grad for x in tensors]
    facts += [x.is_contiguous() for x in tensors]
    for shape in [x.shape for x in tensors]:
        facts.append(tuple([size == 1 for size in shape]) if 1 in shape else len(shape))
    numbers = [*map(id, tensors)]
    if len({*numbers}) < len(numbers):
        facts.append(tuple([numbers.index(number) for number in numbers]))
    return tuple(facts)


class _Region:
    """fn(*args, *static) as one compiled function."""

    def __init__(self, fn: Callable[..., Any], static: tuple[Any, ...], name: str) -> None:
        self.fn, self.static, self.name = fn, static, name
        self.run, self.codes = self._with_new_code(name), 1

    def __call__(self, *args: Any) -> Any:
        try:
            return self.run(*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # pyright: ignore
            # Layers whose ranks differ (EVA) make a graph for every size that changes first.
            self.run = self._with_new_code(f"{self.name}_{self.codes}")
            self.codes += 1
            return self.run(*args)

    def _with_new_code(self, name: str) -> Callable[..., Any]:
        fn, static = self.fn, self.static

        def region(*args):
            return fn(*args, *static)

        # The new code object also needs a new name. dynamo remembers by file, line and name which
        # floats and sizes have changed between calls. With a shared name a second model's
        # rms_norm_eps became a symbol, and recomputation inside the graph failed
        # ("lift_tracked_freevar_to_input"; torch 2.11 and 2.13).
        code = region.__code__.replace(co_name=name, co_qualname=name)
        renamed = FunctionType(code, region.__globals__, fn.__name__, None, region.__closure__)
        return torch.compile(renamed, fullgraph=True, backend=backend)


@cache
def _region(
    fn: Callable[..., Any], static: tuple[Any, ...], modes: tuple, facts: tuple
) -> Callable[..., Any]:
    return _Region(fn, static, f"{fn.__name__}_{_region.cache_info().misses}")


def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor, with its disk cache also for graphs that contain an autograd.Function.

    All our graphs contain one, and torch caches these only on request (pytorch#149751 found it
    safe). With this and the `cache_hash` of layer.py, a second process traces a layer and compiles
    nothing.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415  half a second

    with (
        torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True),  # pyright: ignore
        _no_advice_about_checkpoints(),
        compiling_kernels(device_of(inputs)) as kernels,
    ):
        return compile_fx(graph, inputs, config_patches=_settings() | kernels)


def _settings() -> dict[str, Any]:
    """Inductor's settings for our graphs. compile_fx applies them to the backward graph too.

    aot_inductor.metadata: puts the source of our ops into the key of each cached graph. A graph
        contains only their names, and would otherwise still be used after their code has changed.
        Ordinary compilation reads nothing else from it. torch.compiler.config.cache_key_tag is not
        suitable: it is also part of the key of a kernel's best tile, and backward graphs and
        compiler processes do not see it when they are compiled, so that the next process searched
        for other keys, found none and measured those tiles again.
    dynamic_scale_rblock: off. It adds a second tile to some reductions, and every process measures
        again which is faster (pytorch#189121). The two sum in different order, so two runs could
        differ in their last bits.
    """
    from torch._inductor import config  # noqa: PLC0415  half a second

    metadata = config.aot_inductor.metadata | {"fastlora.ops": _source_of_ops()}
    return {"aot_inductor.metadata": metadata, "dynamic_scale_rblock": False}


@contextmanager
def _no_advice_about_checkpoints() -> Iterator[None]:
    """Without torch's advice to look for in-place ops in regions that are recomputed.

    torch logs it for every such region of a graph. The regions are ours, and have no in-place ops.
    """
    log = logging.getLogger("torch._higher_order_ops.wrap")
    keep = lambda record: "context_fn is passed" not in record.getMessage()
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


@cache
def _source_of_ops(folder: Path = Path(__file__).parents[1] / "ops") -> str:
    """A hash of every Python file in a folder and its sub-folders."""
    files = sorted(folder.rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
