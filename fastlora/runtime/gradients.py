"""The one file of the hot path that asks for gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastlora.errors import raise_problems
from fastlora.runtime.cuda_graph import CUDAGraphed


def value_and_grad(
    fn: Callable[..., Tensor], *, cuda_graph: bool = False
) -> Callable[..., tuple[Tensor, Any]]:
    """Differentiate `fn`, which returns a scalar, by its first argument, a tree of tensors.

    The returned function gives (value, grads): grads has the structure, shapes and dtypes of the
    first argument, zeros for a leaf that does not reach the value, as torch.func.grad has it.
    Nothing is written to `.grad`, and the caller's tensors are left as they were.

    Not torch.func.grad: inside torch.compile it silently drops custom backwards (pytorch#193279,
    torch 2.13), and it cannot carry the saved-tensor hooks that recomputation needs.

    Args:
        fn: of a tree of tensors and anything else.
        cuda_graph: record forward and backward pass at the second call with arguments of the same
            shapes, and play them back from the third on: for small steps, where the GPU would wait
            for the host. See `cuda_graph.CUDAGraphed` for what may be recorded; keep the returned
            function, which holds the recordings and the memory of one step.

    Raises:
        ValueError: if a leaf is no floating-point tensor, or the value is no scalar, or with
            cuda_graph=True a tensor is not on a CUDA device.
        RuntimeError: with cuda_graph=True, if fn waits for the GPU.
    """

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        leaves, structure = tree_flatten(params)
        _check_leaves(leaves)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = fn(tree_unflatten(leaves, structure), *args, **kwargs)
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"value_and_grad needs a function that returns a scalar, got {shape}.")
        if not value.requires_grad:
            return value.detach(), tree_unflatten([torch.zeros_like(x) for x in leaves], structure)
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return value.detach(), tree_unflatten(list(grads), structure)

    return CUDAGraphed(wrapped) if cuda_graph else wrapped


def _check_leaves(leaves: list[Any]) -> None:
    if not leaves:
        raise ValueError("value_and_grad got a first argument without tensors; nothing to do.")
    kinds = [x.dtype if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in leaves]
    problems = [f"leaf {i} is {kinds[i]}" for i, fine in enumerate(floating) if not fine]
    raise_problems(
        ValueError,
        "every leaf of value_and_grad's first argument must be a floating-point tensor:",
        problems,
        "Pass anything else as a later argument.",
    )
