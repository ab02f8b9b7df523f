"""StepGraphs: records a decoding step in a CUDA graph and replays it.

The host needs longer to launch the kernels of a step than the GPU to run them. A replayed step is
one launch. A graph reads and writes fixed addresses, so it serves as long as the cache and the
state of the rows are the same tensors.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch

# A graph holds some MB of launches. A server's clients could ask for hundreds of variants.
_MOST_GRAPHS = 64


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
        self.replays: dict[Hashable, Callable[[], None]] = {}
        self.pool: Any = None  # memory of the steps' intermediate tensors; one step uses it a time

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run a step once: as it is the first time, and recorded and replayed from the second on.

        The first run compiles kernels and lets libraries allocate their workspaces, which must not
        happen while a graph is recorded. It is a step like any other: its results count.
        """
        if not self.record:
            step()
        elif key in self.replays:
            self.replays[key]()
        elif key in self.ran:
            if len(self.replays) == _MOST_GRAPHS:
                del self.replays[next(iter(self.replays))]  # the oldest
            self.replays[key] = self._capture(step)  # runs nothing
            self.replays[key]()
        else:
            self._on_side_stream(step)
            self.ran.add(key)

    def clear(self) -> None:
        """Forget all graphs, because tensors that they read were replaced."""
        # Steps must run once without a graph again: libraries keep workspaces for each shape.
        self.ran.clear()
        self.replays.clear()
        self.pool = None

    def _on_side_stream(self, step: Callable[[], None]) -> None:
        """Run the step on another stream, as torch's notes on graphs ask for before a capture."""
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            step()
        current.wait_stream(side)

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record the launches of `step`; the result replays them."""
        graph = torch.cuda.CUDAGraph()
        # In the default mode a CUDA call of any other thread, such as a server's, would end the
        # capture with an error.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step()
        self.pool = graph.pool()
        return graph.replay
