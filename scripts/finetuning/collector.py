"""Python's garbage collector does not look at what was imported.

Importing torch with dynamo and Inductor makes a million objects that stay, and the collector looks
at them again and again: 0.66 s of 2.5 s on a CPU, and 0.25 s more while the first layer is compiled
(torch 2.13). So finetune.py calls gc.disable() before its imports, and trains in `imports_kept`.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_kept() -> Iterator[None]:
    """Enable the collector, which collects only objects that are made during the block.

    Afterwards it collects all objects again: Triton reports objects as leaked that stay frozen
    until the end of the process.
    """
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()
