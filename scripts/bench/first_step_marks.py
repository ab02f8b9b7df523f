"""Run a script up to its first training step, and write when its parts began and ended.

first_step_marks.py MARKS STARTED auto|compile SCRIPT OPTIONS...   (started by first_step.py)

A finder in front of sys.meta_path sees each import. It notes when the module was found and when
its execution ended, and it replaces some functions of the module with ones that note their calls.
"""

import json
import os
import runpy
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

# Modules whose imports are noted.
MODULES = {
    "torch",
    "sympy",
    "triton",
    "tokenizers",
    "tyro",
    "fastlora.loading",
    "fastlora.training.loop",
    "torch._dynamo",
    "torch._inductor",
    "torch._inductor.codecache",
    "torch._inductor.compile_fx",
    "torch._functorch.aot_autograd",
}

# Functions whose calls are noted, by module. A name that a release of torch lacks is left out.
FUNCTIONS = {
    "fastlora.loading": ("load",),
    "fastlora.checkpoints.reading": ("check_base", "_read_weights"),
    "fastlora.adapters.create": ("lora",),
    "fastlora.training.run": ("prepare_run",),
    "fastlora.training.learner": ("make_learner",),
    "fastlora.training.loop": ("train", "_run_steps"),
    "fastlora.training.step": ("optimizer_step", "_loss_and_gradient", "update"),
    "fastlora.runtime.compiled": ("backend",),
    "fastlora.runtime.kernels_ahead": ("graph_launches", "compile_launch"),
    "torch._inductor.compile_fx": ("compile_fx_inner",),
    "torch._dynamo.convert_frame": ("_compile",),
    "torch._functorch.aot_autograd": ("aot_module_simplified",),
    "torch._inductor.runtime.triton_heuristics": ("CachingAutotuner.benchmark_all_configs",),
    "torch._inductor.codecache": ("torch_key",),
    "torch._inductor.async_compile": ("maybe_warm_pool",),
    "triton.runtime.cache": ("triton_key",),
    "triton.compiler.compiler": ("compile", "CompiledKernel._init_handles"),
    "triton.runtime.build": ("_build",),
}
LAST = "optimizer_step"

# Functions of which every call of a millisecond or more is noted, under the name of what they
# compile or load. Triton asks for a kernel's handles at every launch.
SHORTEST = 1e-3
NAMED: dict[str, Callable[[Any], str]] = {
    "benchmark_all_configs": lambda tuner: tuner.fn.__name__,
    "compile": lambda source: source.name,
    "compile_launch": lambda launch: launch.kernel.__name__,
    "_init_handles": lambda kernel: kernel.name,
    "_build": lambda name: name,
}

marks: list[tuple[str, str, float, float]] = []


class Watch:
    """A finder that leaves the search to PathFinder and notes imports."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in MODULES and name not in FUNCTIONS:
            return None
        begin = time.time()
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if name in MODULES:
                    marks.append((f"import {name}", thread(), begin, time.time()))
                for function in FUNCTIONS.get(name, ()):
                    note_calls(module, function)
                if COMPILE and name == "fastlora.adapters.create":
                    module.lora = compiling(module.lora)

            spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def note_calls(module: Any, name: str) -> None:
    """Replace a function, or the method of a class ("Class.method"), if the module has it."""
    *owner, name = name.split(".")
    owner = getattr(module, owner[0], None) if owner else module
    if hasattr(owner, name):
        setattr(owner, name, noted(getattr(owner, name), name))


def noted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, which notes its first eight calls, or the calls described at NAMED."""
    calls = 0

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        begin = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            if name in NAMED and time.time() - begin < SHORTEST:
                pass
            elif name in NAMED:
                failed = sys.exc_info()[0]
                part = f"{name} {NAMED[name](args[0])}" + (f" {failed.__name__}" if failed else "")
                marks.append((part, thread(), begin, time.time()))
            elif calls <= 8:
                marks.append((f"{name}()", thread(), begin, time.time()))
            if name == LAST:
                write()

    return wrapper


def thread() -> str:
    return threading.current_thread().name


def write() -> None:
    """Write the marks and end the process: what follows the first step is not measured."""
    end = time.time()
    import torch  # noqa: PLC0415  the script has imported it
    from torch._dynamo.utils import compile_times, counters  # noqa: PLC0415

    names, values = compile_times(repr="csv", aggregate=True)
    times = sorted(((float(str(v)), n) for n, v in zip(names, values, strict=True)), reverse=True)
    counts: dict[str, Any] = {f"dynamo: {n}": round(v, 2) for v, n in times[:16]}
    for kind in ("stats", "aot_autograd", "inductor"):
        counts[kind] = dict(counters[kind])
    counts["files in the cache"] = files_by_suffix()
    counts |= {f"{kind}: calls and seconds": total(kind) for kind in NAMED}
    found = {
        "torch": torch.__version__,
        "total_s": end - STARTED,
        "marks": [(part, name, a - STARTED, b - STARTED) for part, name, a, b in marks],
        "counts": counts | {"modules": len(sys.modules)},
    }
    Path(MARKS).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def total(kind: str) -> tuple[int, float]:
    """The number of a function's calls, and their seconds, of all threads together."""
    seconds = [b - a for part, _, a, b in marks if part.startswith(f"{kind} ")]
    return len(seconds), round(sum(seconds), 2)


def files_by_suffix() -> dict[str, int]:
    """Files in Inductor's cache: .best_config are tiles that need not be measured again."""
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    return dict(Counter(path.suffix for path in folder.rglob("*") if path.is_file()))


def compiling(lora: Callable[..., Any]) -> Callable[..., Any]:
    """lora(), whose models run compiled regions on the CPU too."""
    return wraps(lora)(lambda *args, **kwargs: lora(*args, **kwargs).with_spec(compile=True))


if __name__ == "__main__":
    MARKS, started, compile, script, *options = sys.argv[1:]
    STARTED = float(started)
    marks.append(("start of Python", thread(), STARTED, time.time()))
    sys.meta_path.insert(0, Watch())  # pyright: ignore[reportArgumentType]
    COMPILE = compile == "compile"
    sys.path[0] = str(Path(script).parent)
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")
