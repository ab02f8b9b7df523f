"""Time and memory of loading a checkpoint: seconds, largest tensor, peak anonymous host memory.

    python scripts/bench/measure_load.py [--folder FOLDER] [--device cpu] [--load-in-4bit] [--peer]
    python scripts/bench/measure_load.py --shape 8b --device cuda --peer --out rows.jsonl

With --device cuda the script also prints the GPU's peak memory. With --peer it then loads the same
checkpoint with transformers, and with fastlora once more. Without --folder it first writes a random
bf16 checkpoint of --shape (1b: 2.5 GB, sharded) to a temporary folder, one layer at a time, and
deletes it afterwards. Files that were just written are read from the page cache. Linux only: memory
is read from /proc.
"""

import argparse
import gc
import re
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import results
import torch
from random_checkpoint import SHAPES, write_checkpoint
from torch.utils._pytree import tree_leaves

from fastlora.checkpoints.reading import read_base
from fastlora.ops.quant.bitsandbytes import bitsandbytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak host memory of loading.")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, help="an existing checkpoint")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--peer", action="store_true", help="load with transformers too")
    parser.add_argument("--out", type=Path, help="append rows as in scripts/bench/results.jsonl")
    args = parser.parse_args()
    command = command_of(args)
    with tempfile.TemporaryDirectory() as name:
        if not args.folder:
            args.folder = Path(name)
            write_checkpoint(SHAPES[args.shape], args.folder)
        torch.ones(1, device=args.device)  # exclude the device's start-up from the measurement
        if args.load_in_4bit:
            bitsandbytes()  # exclude its import too
        loads = [("fastlora", ours)]
        if args.peer:
            loads += [("transformers", theirs), ("fastlora", ours)]
        for who, load in loads:
            figures = measure(who, partial(load, args), args.device)
            if args.out:
                results.append(args.out, results.row(command, {"setting": who} | figures))


def command_of(args: argparse.Namespace) -> str:
    """The command that gives these figures again."""
    model = f"--folder {args.folder}" if args.folder else f"--shape {args.shape}"
    words = [f"python scripts/bench/measure_load.py {model} --device {args.device}"]
    words += [f"--dtype {args.dtype}"] * (args.dtype != "auto")
    words += ["--load-in-4bit"] * args.load_in_4bit + ["--peer"] * args.peer
    return " ".join(words)


def ours(args: argparse.Namespace) -> Any:
    wanted = None if args.dtype == "auto" else getattr(torch, args.dtype)
    quantize = "nf4" if args.load_in_4bit else None
    return read_base(args.folder, dtype=wanted, device=args.device, quantize=quantize)[1]


def theirs(args: argparse.Namespace) -> Any:
    transformers = import_module("transformers")
    more = {}
    if args.load_in_4bit:
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=args.dtype, device_map={"": args.device}, **more
    )
    return dict(model.named_parameters())


def measure(who: str, load: Callable[[], Any], device: str) -> dict[str, float]:
    """Load, print the figures and return them."""
    cuda = device.startswith("cuda")
    gc.collect()  # a model of transformers holds itself in cycles
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with PeakAnonymous() as memory:
        start = time.perf_counter()
        base = load()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    sizes = [leaf.nbytes for leaf in tree_leaves(base)]
    print(
        f"{who}: {seconds:.2f} s; weights {sum(sizes) / 1e9:.2f} GB, largest tensor"
        f" {max(sizes) / 1e6:.0f} MB, on {device}"
    )
    print(f"  peak anonymous host memory beyond the start: {memory.peak / 1e6:.0f} MB", flush=True)
    figures = {"s": round(seconds, 2), "weights_gb": round(sum(sizes) / 1e9, 3)}
    figures |= {"host_mb": round(memory.peak / 1e6)}
    if cuda:
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        print(
            f"  {device}: peak {peak / 1e9:.3f} GB,"
            f" {(peak - held) / 1e6:.0f} MB more than the loaded weights"
        )
        figures |= {"gpu_peak_gb": round(peak / 1e9, 3), "beyond_mb": round((peak - held) / 1e6)}
    return figures


class PeakAnonymous:
    """Poll RssAnon, the memory that is not backed by files, every millisecond.

    `peak` is its largest growth in bytes.
    """

    def __enter__(self) -> "PeakAnonymous":
        self.peak, self._start, self._done = 0, anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(1e-3):
            self.peak = max(self.peak, anonymous() - self._start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous() - self._start)


def anonymous() -> int:
    """This process's RssAnon in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found, "this kernel does not report RssAnon"
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
