"""value_and_grad(): the only place of a training step that calls autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastlora.arguments import FLAG, FUNCTION, Rule, check_arguments
from fastlora.errors import raise_problems
from fastlora.ops.dispatch import transforms_active
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.runtime.per_example import HOW, PerExample, Sketch, check_values

_PER_EXAMPLE = Rule(lambda x: x is False or HOW.accepts(x), HOW.expected)


def value_and_grad(
    fn: Callable[..., Tensor],
    *,
    cuda_graph: bool = False,
    per_example: bool | str | Sketch = False,
) -> Callable[..., tuple[Tensor, Any]]:
    """Differentiate `fn`, which returns a scalar, by its first argument, a tree of tensors.

    The returned function returns (value, grads). grads has the structure, shapes and dtypes of the
    first argument. A leaf that the value does not depend on gets zeros, as in torch.func.grad.
    Nothing is written to `.grad`, and the caller's tensors do not change.

    We do not use torch.func.grad, because inside torch.compile it silently drops custom backward
    functions (pytorch#193279, torch 2.13) and because it refuses the saved-tensor hooks that
    recomputation needs. Inside a transform (vmap, jvp, grad, a dual level of forward_ad) ops run
    their reference, which needs neither. There the call is torch.func.grad_and_value with its two
    results swapped, so it can be transformed and differentiated, and no CUDA graph is recorded.

    With `per_example`, fn returns one value for each of b examples, [b], of which value i may
    depend on example i only, and one backward pass gives the gradient of each:

        True               (values [b], grads with leaves [b, ...])
        "norms"            (values [b], Euclidean norms [b] of the whole gradients)
        Sketch(k, seed)    (values [b], count sketches [b, k])

    For norms and sketches no more than one layer's gradients are in memory. The first argument is
    an adapter. fn gets a placeholder for it, which it may only pass to functions of
    fastlora.functional. These treat it as a stack of b copies of the adapter: row i of a batch
    is example i, or `adapter_ids` says which example each row [b] belongs to, or each token
    [b, t], for packed documents. Dropout masks are those of the rows in the whole batch, so value i
    and its gradient are those of value_and_grad(lambda a: fn(a)[i]). Norms need a single call of
    these functions.
    LoRA in the layers, experts included, takes one ordinary backward pass. With DoRA, lora_bias,
    fake quantisation, an initial offset or anything trained outside of LoRA, rows run under
    torch.vmap, as `fastlora.functional` says of stacks, and norms and sketches are computed from
    all gradients.

    Args:
        fn: a function of a tree of tensors and any other arguments.
        cuda_graph: True records the forward and backward pass at the second call with arguments of
            the same shapes, and replays the recording from the third call on. It makes small steps
            faster, in which the GPU waits for the host. `cuda_graph.CUDAGraphed` says what can be
            recorded. Keep the returned function: it holds the recordings and the memory of one
            step.
        per_example: False, or what is computed for each example.

    Raises:
        ValueError: an argument has a wrong class or value; later, in calls: a leaf is not a
            floating-point tensor, the value is not a scalar, or with cuda_graph=True a tensor is
            not on a CUDA device. With `per_example`: the first argument is not an adapter, the
            values are not [b], calls in fn have different numbers of examples, or fn makes two
            calls for "norms".
        RuntimeError: in calls with cuda_graph=True: fn waits for the GPU. With `per_example`: the
            call is inside a torch.func transform.
    """
    check_arguments(
        "fastlora.value_and_grad",
        fn=(fn, FUNCTION),
        cuda_graph=(cuda_graph, FLAG),
        per_example=(per_example, _PER_EXAMPLE),
    )
    run = _of_sum(fn) if per_example is False else _of_each(fn, per_example)
    return CUDAGraphed(run) if cuda_graph else run


def _of_sum(fn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Any]]:
    """(value, grads) of a function that returns a scalar."""

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

    return wrapped


def _of_each(
    fn: Callable[..., Tensor], how: bool | str | Sketch
) -> Callable[..., tuple[Tensor, Any]]:
    """(values, results) of a function that returns one value for each example."""

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        _check_leaves(tree_leaves(params))
        _check_is_adapter(params)
        if transforms_active():
            raise RuntimeError(
                "value_and_grad(per_example=...) runs no torch.func transform; transform"
                " value_and_grad of a function of one row instead, as in"
                " torch.vmap(value_and_grad(fn), in_dims=(None, 0))."
            )
        examples = PerExample(params, how)
        with torch.enable_grad():
            values = fn(examples, *args, **kwargs)
            check_values(values, examples.n)
            results = examples.results(values)
        return values.detach(), results

    return wrapped


def _check_is_adapter(params: Any) -> None:
    # Of a stack, the functions of functional.py say so: models are above this folder.
    if not (isinstance(params, dict) and "layers" in params):
        raise ValueError(
            "value_and_grad(per_example=...) differentiates an adapter, and got another tree as the"
            " first argument; pass model.adapter."
        )


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
