"""Trees of tensors as vectors: checks, inner products, and one flat vector for SciPy."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastlora.arguments import describe
from fastlora.errors import raise_problems
from fastlora.ops.dispatch import transforms_active


def adapter_problems(adapter: Any) -> list[str]:
    """Problems with the tree at which a function is linearised."""
    leaves = tree_leaves(adapter)
    wrong = [
        f"adapter: leaf {i} is {describe(x)}, expected a floating-point tensor"
        for i, x in enumerate(leaves)
        if not (isinstance(x, Tensor) and x.is_floating_point())
    ]
    return wrong if leaves else ["adapter is a tree without tensors; pass model.adapter"]


def point(adapter: Any) -> Any:
    """The adapter without its autograd history. Under a transform, which may differentiate by the
    adapter, it is returned unchanged."""
    return adapter if transforms_active() else tree_map(Tensor.detach, adapter)


def like(vector: Any, adapter: Any, function: str) -> Any:
    """The vector with the adapter's dtypes.

    Raises:
        ValueError: the vector is not a tree of the adapter's structure and shapes.
    """
    leaves, structure = tree_flatten(adapter)
    given, other = tree_flatten(vector)
    if other != structure:
        raise ValueError(
            f"{function} needs a tree of the adapter's structure, got {describe(vector)};"
            " research.unravel makes one of a flat vector."
        )
    problems = [
        f"leaf {i} is {describe(v)}, expected a floating-point tensor {list(x.shape)}"
        for i, (v, x) in enumerate(zip(given, leaves, strict=True))
        if not isinstance(v, Tensor) or not v.is_floating_point() or v.shape != x.shape
    ]
    raise_problems(ValueError, f"{function} cannot use this vector:", problems)
    return tree_map(lambda v, x: v.to(x.dtype), vector, adapter)


def inner(a: Any, b: Any) -> Float[Tensor, ""]:
    """The inner product of two trees, in at least float32."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    # Wide before the product: in float16 the square of a gradient of 1e-4 is 0.
    wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.stack([(wide(x) * wide(y)).sum() for x, y in pairs]).sum()


def ravel(tree: Any) -> Float[Tensor, "p"]:
    """All numbers of a tree as one vector: its leaves in the order of torch.utils._pytree.

    Its dtype is the one to which torch promotes the dtypes of all leaves.

    Raises:
        ValueError: a leaf is not a floating-point tensor.
    """
    raise_problems(ValueError, "research.ravel cannot use this tree:", adapter_problems(tree))
    return torch.cat([x.reshape(-1) for x in tree_leaves(tree)])


def unravel(vector: Any, adapter: Any) -> Any:
    """A flat vector as a tree with the adapter's structure, shapes, dtypes and devices.

    Args:
        vector: a tensor or NumPy array [p] of real numbers, such as an eigenvector of SciPy.
        adapter: p numbers.

    Raises:
        ValueError: the vector is something else, or does not have p elements.
    """
    raise_problems(ValueError, "research.unravel cannot do this:", adapter_problems(adapter))
    leaves, structure = tree_flatten(adapter)
    sizes = [x.numel() for x in leaves]
    flat = _real_tensor(vector)
    if flat is None or flat.shape != (sum(sizes),):
        raise ValueError(
            f"research.unravel needs a vector [{sum(sizes)}], one real number for each of the"
            f" adapter's (of a complex vector, pass the real and the imaginary part one by one),"
            f" got {describe(vector)}."
        )
    parts = zip(flat.split(sizes), leaves, strict=True)
    new = [part.to(x.device, x.dtype).view(x.shape) for part, x in parts]
    return tree_unflatten(new, structure)


def _real_tensor(x: Any) -> Tensor | None:
    """A tensor or array as a tensor of real numbers; None: it is neither, or complex."""
    try:
        # Contiguous: torch refuses arrays with negative strides, such as x[::-1].
        is_tensor = isinstance(x, Tensor)
        new = x if is_tensor else torch.as_tensor(np.ascontiguousarray(x), device="cpu")
    except (TypeError, ValueError, RuntimeError):  # which one depends on the class of x
        return None
    return None if new.is_complex() else new
