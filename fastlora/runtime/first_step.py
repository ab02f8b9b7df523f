"""Modules of torch that only the first training step needs, imported while data are read.

Every torch.optim optimizer imports torch._dynamo when it is made, and the first compiled layer
imports Inductor. Together they are some 1,500 files: 1.6 s where the files are cached, 8 s on a GPU
machine with slow files.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module

import torch

from fastlora.runtime.compiled import Compile, compiles


@contextmanager
def imports_of_first_step(compile: Compile, device: torch.device) -> Iterator[None]:
    """Import the modules in a thread while the block runs. The end of the block waits for them.

    The block itself should not import them: two threads in one circular import may see modules that
    are not complete. An import that fails is left to the code that needs the module. If the block
    raises, the error is not kept waiting.

    Args:
        compile: the model's setting.
        device: of the model.
    """
    inductor = ("torch._inductor.compile_fx",) if compiles(compile, device) else ()
    pool = ThreadPoolExecutor(1, "fastlora-imports")
    try:
        for name in ("torch._dynamo", *inductor):
            pool.submit(import_module, name)
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
