"""A thread prepares the first training step while data are read.

Every torch.optim optimizer imports torch._dynamo when it is made, and the first compiled layer
imports Inductor. Together they are some 1,500 files, which take 1.6 s, and several seconds more if
Python has to compile them because it may not keep their bytecode. Inductor then hashes all source
files of torch and Triton's library for its cache keys, 0.4 s, and starts processes for Triton's
compiler. Our own kernels are compiled while Inductor compiles their region (kernels_ahead.py). The
loss's kernel is part of none, and is compiled here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from fastlora.ops.launch import Launch
from fastlora.runtime.ahead import Ahead, ahead, imports
from fastlora.runtime.compiled import Compile, compiles
from fastlora.runtime.devices import as_current
from fastlora.runtime.kernels_ahead import start_compiling

# sympy is half of dynamo. As a task of its own it lets a thread that is stopped end sooner.
DYNAMO = ("sympy", "torch._dynamo")

# What hashes files for the keys of Inductor's cache.
CACHE = "torch._inductor.codecache"

# With what Inductor imports on its first use, also if it finds all graphs in its cache. Large parts
# of a module are before it, so that a thread that is stopped ends sooner.
INDUCTOR = (
    "torch._functorch.partitioners",
    "torch._functorch.aot_autograd",
    "torch._inductor.decomposition",
    "torch._inductor.lowering",
    "torch._inductor.compile_fx",
    "torch._dynamo.repro.after_dynamo",
    "torch._dynamo.backends.inductor",
    "torch.distributed.tensor.experimental",
    "torch.export._trace",
    "torch._inductor.codegen.cuda_combined_scheduling",
    "torch._inductor.codegen.wrapper_fxir",
    "torch._inductor.codegen.cpp_wrapper_gpu",
    "torch._functorch._aot_autograd.subclass_codegen",
)


@contextmanager
def importing_compiler(wanted: bool) -> Iterator[None]:
    """Import dynamo and Inductor in a thread while the block runs.

    The end of the block waits for the module that is being imported, and leaves the others to the
    first step: code of the caller that follows may import parts of torch itself.

    Args:
        wanted: else nothing is imported.
    """
    thread = ahead(imports((*DYNAMO, CACHE, *INDUCTOR))) if wanted else None
    try:
        yield
    finally:
        if thread is not None:
            thread.stop()
            thread.wait()


@contextmanager
def preparing_first_step(
    compile: Compile,
    device: torch.device,
    compilers: bool = True,
    launches: Callable[[], list[Launch]] = list,
) -> Iterator[None]:
    """Prepare the first step in threads while the block runs. The end of the block waits for them.

    The block itself should not import parts of torch: two threads in one circular import may see
    modules that are not complete. If the block raises, the error is not kept waiting.

    Args:
        compile: the model's setting.
        device: of the model.
        compilers: start compiler processes, if they may be needed. Of the ranks of a machine only
            the first one should, because the others read its cache.
        launches: finds launches of the first step that are not part of a compiled region. Their
            kernels are compiled in threads that the end of the block does not wait for.
    """
    tasks: list[Callable[[], object]] = imports(DYNAMO)
    # The thread that hashes Triton's files. It imports nothing, and most of the time it leaves
    # Python's lock to the imports.
    hashing: list[Ahead] = []
    if compiles(compile, device):
        tasks += [partial(_start_compilers, device)] if compilers else []
        tasks += imports([CACHE])
        tasks.append(lambda: hashing.append(ahead([partial(_hash_triton, device)])))
        tasks += imports(INDUCTOR)
        tasks.append(_hash_torch)
        tasks.append(lambda: [each.wait() for each in hashing])  # Triton would hash once more
        tasks.append(lambda: start_compiling(launches(), device))
    thread = ahead(tasks)
    try:
        yield
    except BaseException:
        thread.stop()
        raise
    thread.wait()


def _hash_torch() -> None:
    """Hash torch's files for the keys of Inductor's cache, which keeps the result for the process.

    They are 1,500 small files. Beside a thread that imports, each would wait for Python's lock.
    """
    from torch._inductor.codecache import torch_key  # noqa: PLC0415  half a second

    torch_key()


def _hash_triton(device: torch.device) -> None:
    """Hash Triton's files for these keys. Most of their bytes are in one library."""
    from torch._inductor.codecache import CacheBase  # noqa: PLC0415  half a second

    with as_current(device):  # get_system asks for the properties of the current one
        CacheBase.get_system()


def _start_compilers(device: torch.device) -> None:
    """Start Inductor's compiler processes, unless its cache seems to have the graphs.

    They need as long as this process to import torch, and until they are ready Inductor compiles
    one kernel after the other.
    """
    from torch._inductor.async_compile import maybe_warm_pool  # noqa: PLC0415  half a second
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # noqa: PLC0415

    if device.type == "cuda" and not (Path(cache_dir()) / "aotautograd").is_dir():
        maybe_warm_pool()
