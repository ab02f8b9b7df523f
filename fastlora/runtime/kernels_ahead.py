"""Compiles the Triton kernels that a graph launches, while Inductor compiles the graph.

Otherwise Triton compiles them one after the other at their first launch, 0.2 to 1.4 s each. Its
passes, ptxas and the C compiler leave Python's lock free, so threads compile several at once. When
AOTAutograd has traced forward and backward pass, their ops are known with shapes, strides and
types, and `launches_of` says what each op launches. A graph that Inductor finds in its cache is not
traced; its kernels are in Triton's cache.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fastlora.ops.launch import Launch, implementation, launches_of
from fastlora.runtime.ahead import Ahead, ahead
from fastlora.runtime.cores import usable_cores
from fastlora.runtime.devices import as_current

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None


@contextmanager
def compiling_kernels(device: torch.device) -> Iterator[dict[str, Any]]:
    """Settings for Inductor with which a graph's kernels are compiled in threads.

    The end of the block waits for the threads, because a kernel that is launched meanwhile would be
    compiled twice. If the block raises, the error is not kept waiting. Errors of threads are
    dropped: the launch compiles the kernel again, and raises them.

    Args:
        device: of the graph; no kernels are compiled for devices other than CUDA.
    """
    threads: list[Ahead] = []
    if device.type != "cuda":
        yield {}
        return
    try:
        yield _settings(
            lambda graph: threads.extend(start_compiling(graph_launches(graph), device))
        )
        for thread in threads:
            thread.wait()
    except BaseException:
        for thread in threads:
            thread.stop()
        raise


def _settings(start: Callable[[torch.fx.Graph], object]) -> dict[str, Any]:
    """Inductor's settings with which `start` gets the graph of forward and backward pass."""
    from torch._inductor import config  # noqa: PLC0415  half a second
    from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: PLC0415

    if config.joint_custom_pre_pass is not None:  # the user's
        return {}

    class ReadGraph(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            start(graph)

        def uuid(self) -> str:
            """A part of the keys of Inductor's cache. The graph is not changed."""
            return "fastlora.runtime.kernels_ahead"

    return {"joint_custom_pre_pass": ReadGraph()}


def start_compiling(launches: Iterable[Launch], device: torch.device) -> list[Ahead]:
    """Threads that compile the kernels of launches: at most one for each core of this process.

    The longest kernels are first, because Triton takes most time for them.
    """
    _keep_beside_inductors(device)
    different = {launch.key(): launch for launch in launches}.values()
    length = lambda launch: len(launch.kernel.fn.__code__.co_code)
    longest_first = sorted(different, key=length, reverse=True)
    tasks = [partial(compile_launch, launch, device) for launch in longest_first]
    cores = usable_cores()
    return [ahead(tasks[i::cores]) for i in range(min(cores, len(tasks)))]


def _keep_beside_inductors(device: torch.device) -> None:
    """Let Triton keep kernels in the folder in which later processes will look for them.

    Unless TRITON_CACHE_DIR is set, Inductor sets it when it makes its first kernel, for the rest of
    the process. A kernel that was compiled before would be in another folder, and the next process,
    which finds its graphs in Inductor's cache, would compile it again when it launches it.
    """
    if device.type == "cuda":
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir  # noqa: PLC0415

        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))


def graph_launches(graph: torch.fx.Graph) -> list[Launch]:
    """The launches of a graph's ops. Ops with symbolic sizes are left out."""
    found: list[Launch] = []
    for node in graph.nodes:
        with suppress(Exception):  # parts of torch's graphs are private, and may change
            op, args = _call(node)
            if (function := implementation(op)) and _static(args):
                with _fake_mode(args):
                    found += launches_of(function, *args)
    return found


def _call(node: torch.fx.Node) -> tuple[str, list[Any]]:
    """(the op that a node calls, its arguments with FakeTensors); an empty name for other nodes."""
    if node.op != "call_function":
        return "", []
    given: Any = (node.args, node.kwargs)
    args, kwargs = torch.fx.map_arg(given, lambda of: of.meta["val"])
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.name(), [*args, *kwargs.values()]
    # AOTAutograd wraps ops that write to an argument.
    if node.target is torch.ops.higher_order.auto_functionalized_v2:
        return args[0].name(), _wrapped_arguments(args[0], {**kwargs})
    return "", []


def _wrapped_arguments(op: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of an op in auto_functionalized_v2. Those that it writes to are views of
    `_all_bases`, and are described by further arguments."""
    from torch._higher_order_ops.auto_functionalize import (  # noqa: PLC0415  private
        get_mutable_args,
        read_view_information_from_args,
    )

    bases = kwargs.pop("_all_bases")
    views = read_view_information_from_args(*get_mutable_args(op), kwargs, bases)
    given = kwargs | {name: view.regenerate_view(bases) for name, view in views.items()}
    return [given[argument.name] for argument in op._schema.arguments]


def _fake_mode(args: list[Any]) -> AbstractContextManager[object]:
    """The mode in which FakeTensors were made, in which new tensors have no data either."""
    return next(x.fake_mode for x in tree_leaves(args) if isinstance(x, FakeTensor))


def _static(args: list[Any]) -> bool:
    numbers = [x for x in tree_leaves(args) if not isinstance(x, Tensor)]
    for x in tree_leaves(args):
        if isinstance(x, Tensor):
            numbers += [*x.shape, *x.stride(), x.storage_offset()]
    return not any(isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) for x in numbers)


def compile_launch(launch: Launch, device: torch.device) -> None:
    """Compile a kernel, build its launcher and load both, so that its launch need not."""
    with as_current(device):
        compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
        with _alone(repr([*compiled.src.signature.values()])):
            _ = compiled.run  # reading it loads the kernel, also under `python -O`


@contextmanager
def _alone(types: str) -> Iterator[None]:
    """Let in one thread of all processes at a time, of those that load a launcher of these types.

    Triton builds a launcher, a library, for each list of argument types, and keeps it in a file.
    Without the lock, several threads and processes build the same one at once and replace the file
    that another one is just loading. On a machine with 28 such processes one of them had another
    kernel's launcher (Triton 3.6, NVIDIA H200): "function takes exactly 45 arguments (49 given)".
    """
    if fcntl is None:
        yield
        return
    from triton.runtime.cache import get_cache_manager  # noqa: PLC0415  needs no GPU, but Triton

    key = hashlib.sha256(f"fastlora: launchers of {types}".encode()).hexdigest()
    files: Any = get_cache_manager(key)
    with open(files.lock_path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file unlocks it
        yield
