"""value_and_grad(): the only place of a training step that calls autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastlora.arguments import FLAG, FUNCTION, check_arguments
from fastlora.errors import raise_problems
from fastlora.ops.dispatch import transforms_active
from fastlora.runtime.cuda_graph import CUDAGraphed


def value_and_grad(
    fn: Callable[..., Tensor], *, cuda_graph: bool = False
) -> Callable[..., tuple[Tensor, Any]]:
    """Differentiate `fn`, which returns a scalar, by its first argument, a tree of tensors.

    The returned function returns (value, grads). grads has the structure, shapes and dtypes of the
    first argument. A leaf that the value does not depend on gets zeros, as in torch.func.grad.
    Nothing is written to `.grad`, and the caller's tensors do not change.

    We do not use torch.func.grad, because inside torch.compile it silently drops custom backward
    functions (pytorch#193279, torch 2.13) and because it refuses the saved-tensor hooks that
    recomputation needs. Inside a transform (vmap, jvp, grad, a dual level of forward_ad) ops run
    their reference, which needs neither. There the call is torch.func.grad_and_value with its pair
    turned round, so it can be transformed and differentiated, and nothing is recorded.

    Args:
        fn: a function of a tree of tensors and any other arguments.
        cuda_graph: True records the forward and backward pass at the second call with arguments of
            the same shapes, and replays the recording from the third call on. It makes small steps
            faster, in which the GPU waits for the host. `cuda_graph.CUDAGraphed` says what can be
            recorded. Keep the returned function: it holds the recordings and the memory of one
            step.

    Raises:
        ValueError: `fn` is not a function, or cuda_graph not a bool; later, in calls: a leaf is not
            a floating-point tensor, the value is not a scalar, or with cuda_graph=True a tensor is
            not on a CUDA device.
        RuntimeError: in calls with cuda_graph=True: fn waits for the GPU.
    """
    check_arguments("fastlora.value_and_grad", fn=(fn, FUNCTION), cuda_graph=(cuda_graph, FLAG))

    def scalar(params: Any, *args: Any, **kwargs: Any) -> Tensor:
        value = fn(params, *args, **kwargs)
        if not isinstance(value, Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"value_and_grad needs a function that returns a scalar, got {shape}.")
        return value

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        leaves, structure = tree_flatten(params)
        _check_leaves(leaves)
        if transforms_active():
            grads, value = torch.func.grad_and_value(scalar)(params, *args, **kwargs)
            return value, grads
        # New tensor objects over the same memory: the caller's need not require gradients, and no
        # earlier graph of theirs is reached.
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = scalar(tree_unflatten(leaves, structure), *args, **kwargs)
        # autograd.grad would raise an error for a value that depends on no leaf.
        if not value.requires_grad:
            return value.detach(), tree_unflatten([torch.zeros_like(x) for x in leaves], structure)
        # The value is detached: its graph would keep all activations as long as the caller has it.
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return value.detach(), tree_unflatten(list(grads), structure)

    return CUDAGraphed(wrapped) if cuda_graph else wrapped


def _check_leaves(leaves: list[Any]) -> None:
    if not leaves:
        raise ValueError(
            "value_and_grad got a first argument without tensors, so there is nothing to"
            " differentiate; pass model.adapter, or another tree of tensors."
        )
    problems = [
        f"leaf {i} is {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        for i, x in enumerate(leaves)
        if not (isinstance(x, Tensor) and x.is_floating_point())
    ]
    raise_problems(
        ValueError,
        "every leaf of value_and_grad's first argument must be a floating-point tensor:",
        problems,
        "Pass anything else as a later argument.",
    )
