"""StepGraphs: records decoding steps in CUDA graphs and replays them.

The host needs longer to launch the kernels of a step than the GPU to run them. A replayed graph is
one launch. A graph reads and writes fixed addresses, so it serves as long as the cache and the
state of the rows are the same tensors.

Between two replays the GPU is idle for some microseconds, so a graph may hold several steps. To
record n steps takes the host as long as n steps without a graph. A larger graph is therefore
recorded once the gaps so far have taken as long as its recording will.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from fastlora.runtime.devices import as_current

# A graph holds some MB of launches for each step. A server's clients could ask for hundreds of
# variants.
_MOST_STEPS = 128

# Steps of a graph.
_SIZES = (1, 4, 16)

# Seconds between two replays (8 us on one H200).
_GAP = 8e-6


class StepGraphs:
    """The graphs of one engine, by key: the shape of the step and what its rows need."""

    def __init__(self, device: torch.device, *, record: bool) -> None:
        """Nothing is run or allocated.

        Args:
            device: of the step.
            record: False runs every step without a graph, as on the CPU.
        """
        self.device, self.record = device, record
        self.ran: set[Hashable] = set()  # keys of steps that ran once without a graph
        # By key and number of steps, the oldest first.
        self.replays: dict[tuple[Hashable, int], Callable[[], None]] = {}
        self.pool: Any = None  # memory of the steps' intermediate tensors; one step uses it a time
        self.seconds = math.inf  # for the recording of one step
        self.lost: dict[Hashable, float] = defaultdict(float)  # seconds between replays so far

    def run(self, key: Hashable, step: Callable[[], None], steps: int = 1) -> None:
        """Run a step `steps` times: as it is the first time, and in graphs from the second on.

        The first run compiles kernels and lets libraries allocate their workspaces, which must not
        happen while a graph is recorded. It is a step like any other: its results count.
        """
        while steps > 0:
            size = 1
            if not self.record:
                step()
            elif key in self.ran:
                size = self._size(key, steps)
                self._replay(key, step, size)
            else:
                self._on_side_stream(step)
                self.ran.add(key)
            steps -= size

    def clear(self) -> None:
        """Forget all graphs, because tensors that they read were replaced."""
        # Steps must run once without a graph again: libraries keep workspaces for each shape.
        self.ran.clear()
        self.replays.clear()
        self.lost.clear()
        self.pool = None

    def _size(self, key: Hashable, steps: int) -> int:
        """The most steps in one graph that is recorded already, or whose recording pays."""
        pays = lambda size: self.lost[key] >= size * self.seconds
        fits = [size for size in _SIZES if size <= steps]
        return max(size for size in fits if size == 1 or (key, size) in self.replays or pays(size))

    def _replay(self, key: Hashable, step: Callable[[], None], size: int) -> None:
        """Run `size` steps in one graph, which is recorded if there is none."""
        if (key, size) not in self.replays:
            while self.replays and size + sum(n for _, n in self.replays) > _MOST_STEPS:
                del self.replays[next(iter(self.replays))]  # the oldest
            with as_current(self.device):  # torch records the current device's stream
                self.replays[key, size] = self._capture(step, size)  # runs nothing
        self.replays[key, size]()
        self.lost[key] += _GAP

    def _on_side_stream(self, step: Callable[[], None]) -> None:
        """Run the step on another stream, as torch's notes on graphs ask for before a capture."""
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            step()
        current.wait_stream(side)

    def _capture(self, step: Callable[[], None], size: int) -> Callable[[], None]:
        """Record the launches of `size` steps; the result replays them."""
        graph = torch.cuda.CUDAGraph()
        # In the default mode a CUDA call of any other thread, such as a server's, would end the
        # capture with an error.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            begin = time.perf_counter()
            for _ in range(size):
                step()
        self.seconds = (time.perf_counter() - begin) / size
        self.pool = graph.pool()
        return graph.replay
