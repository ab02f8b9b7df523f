"""What loading costs the host: peak anonymous memory, largest tensor, seconds.

    python scripts/measure_load.py [--folder FOLDER] [--dtype auto] [--device cpu]

Without --folder, a random bf16 checkpoint of Llama 3.2 1B's shape (2.5 GB, in shards) is written
to a temporary folder first, one layer at a time, and deleted afterwards. Linux only: memory is read
from /proc.
"""

import argparse
import re
import tempfile
import threading
import time
from pathlib import Path

import torch
from random_checkpoint import write_checkpoint
from torch.utils._pytree import tree_leaves

from fastlora.loading import read_base


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak host memory of loading.")
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there already")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.folder:
        measure(args.folder, args.dtype, args.device)
        return
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint("1b", Path(name))
        measure(Path(name), args.dtype, args.device)


def measure(folder: Path, dtype: str, device: str) -> None:
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    torch.ones(1, device=device)  # the device's own start-up is not loading
    with PeakAnonymous() as memory:
        start = time.perf_counter()
        _, base = read_base(folder, dtype=wanted, device=device)
        seconds = time.perf_counter() - start
    sizes = [leaf.nbytes for leaf in tree_leaves(base)]
    print(
        f"weights {sum(sizes) / 1e9:.2f} GB, largest tensor {max(sizes) / 1e6:.0f} MB, on {device}"
    )
    print(f"peak anonymous host memory beyond the start: {memory.peak / 1e6:.0f} MB")
    print(f"{seconds:.2f} s")


class PeakAnonymous:
    """Watches RssAnon, memory that is no file's, every millisecond; `peak` is in bytes."""

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
