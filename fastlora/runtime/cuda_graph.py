"""A function of tensors whose launches are recorded in a CUDA graph and played back.

The host needs some 1.5 ms for a layer, forward and backward; where the GPU needs less, it waits.
Played back, a step is one launch. What a recording reads has fixed addresses: an argument that was
in the same place twice (base weights, an adapter that the optimiser writes to) is read there,
anything else is copied into memory of the recording's own. Results are copied out.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.runtime.tree import leaves, with_leaves

# Recordings share the memory of their steps but keep results and copied inputs apart.
_MOST_RECORDINGS = 8


class _Seen(NamedTuple):
    """A call that ran plainly: held, so that nothing new can come to lie at its addresses."""

    inputs: list[Any]
    moved: frozenset[int]  # inputs that have been seen in two places


class _Recording(NamedTuple):
    inputs: list[Any]  # what the graph reads
    moved: frozenset[int]  # the numbers of those that are copies
    replay: Callable[[], None]
    results: Any  # a tree of what the graph writes


class CUDAGraphed:
    """fn, recorded at the second call with arguments of the same shapes, dtypes and other values,
    played back from the third on.

    `fn` takes and gives dicts, tuples and lists of tensors, all on one CUDA device; what else is
    among the arguments is part of the recording, and a new value makes another. It must not wait
    for the GPU, and a number that changes (a seed, a count of tokens) must come as a tensor. Holds
    the memory of one call of fn as long as it lives.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        """Nothing is run or allocated."""
        self.fn = fn
        self.calls: OrderedDict[Hashable, _Seen | _Recording] = OrderedDict()
        self.pool: Any = None  # memory that all recordings use, one at a time

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """fn(*args, **kwargs).

        Raises:
            ValueError: a tensor is not on a CUDA device, or an argument cannot be hashed.
            RuntimeError: fn does what cannot be recorded.
        """
        given = [*leaves((args, kwargs))]
        key = _key((args, kwargs))
        call = self.calls.pop(key, None)
        if isinstance(call, _Recording):
            moved = _moved(call, given)
            if moved <= call.moved:
                self._keep(key, call)
                return _played(call, given)
            call = _Seen(given, moved)  # something lies elsewhere now: record anew
        if call is None:
            _check_devices(given)
            self._keep(key, _Seen(given, frozenset()))
            return self.fn(*args, **kwargs)
        recording = self._record(given, _moved(call, given), args, kwargs)
        self._keep(key, recording)
        return _played(recording, given)

    def _keep(self, key: Hashable, call: _Seen | _Recording) -> None:
        self.calls[key] = call
        while len(self.calls) > _MOST_RECORDINGS:
            self.calls.popitem(last=False)

    def _record(self, given: list, moved: frozenset[int], args: Any, kwargs: Any) -> _Recording:
        inputs = [x.detach().clone() if i in moved else x for i, x in enumerate(given)]
        args, kwargs = with_leaves((args, kwargs), iter(inputs))
        replay, results = self._capture(lambda: self.fn(*args, **kwargs))
        return _Recording(inputs, moved, replay, results)

    def _capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(what plays run's launches, the results it writes to)."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                results = run()
        except Exception as error:
            raise RuntimeError(
                "cuda_graph=True: this function cannot be recorded in a CUDA graph. It must not"
                " wait for the GPU (.item(), bool() of a tensor, a copy from the host), and"
                ' recompute="offload" does not go together with it.'
            ) from error
        self.pool = graph.pool()
        return graph.replay, results


def _key(tree: Any) -> Hashable:
    """A tree's names and sizes, shapes and dtypes, and whatever is no tensor, as it is."""
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


def _moved(call: _Seen | _Recording, given: list[Any]) -> frozenset[int]:
    """Which of the inputs are known not to stay where they are."""
    pairs = enumerate(zip(call.inputs, given, strict=True))
    return call.moved | {
        i for i, (old, new) in pairs if old is not new and i not in call.moved and _apart(old, new)
    }


def _apart(old: Any, new: Any) -> bool:
    return isinstance(new, Tensor) and old.data_ptr() != new.data_ptr()


def _played(recording: _Recording, given: list[Any]) -> Any:
    """One playback on these inputs; results that no later one writes to."""
    if recording.moved:
        copied = [recording.inputs[i] for i in recording.moved]
        torch._foreach_copy_(copied, [given[i].detach() for i in recording.moved])  # pyright: ignore
    recording.replay()
    written = [*leaves(recording.results)]
    own = [torch.empty_like(x) for x in written]
    torch._foreach_copy_(own, written)  # pyright: ignore[reportPrivateImportUsage]
    return with_leaves(recording.results, iter(own))


def _check_devices(given: list[Any]) -> None:
    elsewhere = {str(x.device) for x in given if isinstance(x, Tensor) and not x.is_cuda}
    if elsewhere:
        raise ValueError(
            f"cuda_graph=True records what runs on a CUDA device, and there are tensors on"
            f" {', '.join(sorted(elsewhere))}; move them there, or leave cuda_graph out."
        )
