"""CUDAGraphed: records a function's launches in a CUDA graph and replays them.

The host needs some 1.5 ms to launch a layer's forward and backward pass. If the GPU needs less, it
waits. A replayed step is one launch.

A recording reads from fixed addresses. An argument that had the same address in two calls (base
weights, an adapter that the optimizer updates in place) is read there. Any other argument is copied
into memory that belongs to the recording. Results are copied out.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops.dispatch import transforms_active
from fastlora.runtime.devices import as_current, device_of
from fastlora.runtime.layer_fetching import FetchedLayers, FetchedMatrix
from fastlora.runtime.pinned_buffers import (
    PinnedBuffers,
    fitting,
    hold_until_replayed,
    pinned_from,
)
from fastlora.runtime.tree import leaves, with_leaves

# Recordings share the memory of intermediate tensors. Each has its own results and copied inputs.
_MAX_RECORDINGS = 8


class _FirstCall(NamedTuple):
    """The leaves of a call that was run without recording.

    We keep references so that their memory is not reused before the next call compares addresses.
    """

    inputs: list[Any]
    moved: frozenset[int]  # numbers of inputs that are known to change their address
    pinned: list[int]  # bytes of each piece of pinned memory that the call took


class _Recording(NamedTuple):
    inputs: list[Any]  # the leaves that the graph reads
    moved: frozenset[int]  # the numbers of those that are copies
    replay: Callable[[], None]
    results: Any  # the tree of tensors that the graph writes
    buffers: list[Tensor]  # the pinned memory that it reads and writes


class CUDAGraphed:
    """fn, recorded at the second call with arguments alike, and replayed from the third call on.

    Arguments are alike if they have the same structure, shapes and dtypes, and equal values where
    they are not tensors. `fn` takes and returns dicts, tuples and lists of tensors, all on one CUDA
    device. It must not wait for the GPU. Numbers that change (a seed, a count of tokens) must be
    tensors: a new value of a Python number makes another recording. The object holds the memory of
    one call of fn.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        """Wrap a function. Nothing is run or allocated.

        Args:
            fn: the function, as described above.
        """
        self.fn = fn
        self.calls: OrderedDict[Hashable, _FirstCall | _Recording] = OrderedDict()
        self.pool: Any = None  # memory that all recordings in `calls` use, one at a time
        self.buffers: list[Tensor] = []  # the same in pinned host memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """fn(*args, **kwargs). Inside a torch.func transform fn runs without a recording.

        Raises:
            ValueError: a tensor is not on a CUDA device, or an argument cannot be hashed.
            RuntimeError: fn does something that a CUDA graph cannot record.
        """
        if transforms_active():
            return self.fn(*args, **kwargs)
        given = [*leaves((args, kwargs))]
        _check_sharding(given)
        key = _key((args, kwargs))
        call = self.calls.pop(key, None)
        if isinstance(call, _Recording):
            moved = _moved(call, given)
            if moved <= call.moved:
                self._keep(key, call)
                return _replayed(call, given)
            # An input has a new address: make a new recording.
            call = _FirstCall(given, moved, [buffer.nbytes for buffer in call.buffers])
        if call is None:
            _check_devices(given)
            with pinned_from(pinned := PinnedBuffers()):
                results = self.fn(*args, **kwargs)
            # Not before: a call that raised has not asked for all of its pinned memory.
            self._keep(key, _FirstCall(given, frozenset(), pinned.sizes))
            return results
        self.buffers = fitting(self.buffers, call.pinned)
        recording = self._record(given, _moved(call, given), args, kwargs)
        self._keep(key, recording)
        return _replayed(recording, given)

    def _keep(self, key: Hashable, call: _FirstCall | _Recording) -> None:
        self.calls[key] = call
        while len(self.calls) > _MAX_RECORDINGS:
            self.calls.popitem(last=False)

    def _record(self, given: list, moved: frozenset[int], args: Any, kwargs: Any) -> _Recording:
        inputs = [x.detach().clone() if i in moved else x for i, x in enumerate(given)]
        args, kwargs = with_leaves((args, kwargs), iter(inputs))
        device = device_of(given)
        # torch records the current device's stream.
        with pinned_from(PinnedBuffers(self.buffers)), as_current(device):
            replay, results = self._capture(lambda: self.fn(*args, **kwargs))
        hold_until_replayed(self.buffers, device)
        return _Recording(inputs, moved, replay, results, self.buffers)

    def _capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(a function that replays the launches of `run`, the results that they write to)."""
        graph = torch.cuda.CUDAGraph()
        # Without a recording the pool is no longer in use, and CUDA's allocator refuses it.
        in_use = any(isinstance(call, _Recording) for call in self.calls.values())
        try:
            with torch.cuda.graph(graph, pool=self.pool if in_use else None):
                results = run()
        except Exception as error:
            raise RuntimeError(
                "cuda_graph=True: this function cannot be recorded in a CUDA graph. It must not"
                " wait for the GPU (.item(), bool() of a tensor, a copy from the host)."
            ) from error
        self.pool = graph.pool()
        return graph.replay, results


def _key(tree: Any) -> Hashable:
    """A tree with every tensor replaced by its shape, strides and dtype, as a hashable value."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype
    if isinstance(tree, dict):
        return tuple(tree), tuple([_key(x) for x in tree.values()])
    if isinstance(tree, tuple | list):
        return tuple([_key(x) for x in tree])
    if getattr(tree, "__hash__", None) is None:
        raise ValueError(
            f"cuda_graph=True: an argument is a {type(tree).__name__}, which cannot be compared"
            " with the next call's; pass tensors in dicts, tuples and lists."
        )
    return tree


def _moved(call: _FirstCall | _Recording, given: list[Any]) -> frozenset[int]:
    """Numbers of the inputs that are known to change their address between calls."""
    pairs = enumerate(zip(call.inputs, given, strict=True))
    return call.moved | {
        i
        for i, (old, new) in pairs
        if old is not new and i not in call.moved and _differ_in_address(old, new)
    }


def _differ_in_address(old: Any, new: Any) -> bool:
    return isinstance(new, Tensor) and old.data_ptr() != new.data_ptr()


def _replayed(recording: _Recording, given: list[Any]) -> Any:
    """Replay a recording on these inputs. The results are copies, which no later replay changes."""
    if recording.moved:
        copied = [recording.inputs[i] for i in recording.moved]
        torch._foreach_copy_(copied, [given[i].detach() for i in recording.moved])  # pyright: ignore
    recording.replay()
    written = [*leaves(recording.results)]
    copies = [torch.empty_like(x) for x in written]
    torch._foreach_copy_(copies, written)  # pyright: ignore[reportPrivateImportUsage]
    return with_leaves(recording.results, iter(copies))


def _check_sharding(given: list[Any]) -> None:
    if any(isinstance(x, FetchedLayers | FetchedMatrix) for x in given):
        raise ValueError(
            "cuda_graph=True: a sharded base cannot be recorded, because its layers get other"
            " addresses in every pass; leave cuda_graph out, or load the base with shard=None."
        )


def _check_devices(given: list[Any]) -> None:
    elsewhere = {str(x.device) for x in given if isinstance(x, Tensor) and not x.is_cuda}
    if elsewhere:
        raise ValueError(
            f"cuda_graph=True records work on a CUDA device, but there are tensors on"
            f" {', '.join(sorted(elsewhere))}; move them to CUDA, or leave cuda_graph out."
        )
