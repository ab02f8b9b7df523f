"""attach_to_graph(): the input of the first adapted layer as all other layers have it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class _AttachToGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor):
        # The same memory, but not a view: dynamo would make another dynamic graph for a view.
        return x.new_empty(0).set_(x)

    @staticmethod
    def backward(ctx, dx):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None


def attach_to_graph(x: Tensor) -> Tensor:
    """x as a tensor that requires a gradient, which is then dropped.

    x.requires_grad_() would make x a leaf, which the graph keeps to the end of the backward pass.
    """
    anchor = torch.empty((), dtype=torch.float32, device=x.device, requires_grad=True)
    return _AttachToGraph.apply(x, anchor)  # pyright: ignore[reportReturnType]


def requires_grad(tree: Any) -> bool:
    """Whether any tensor of a tree requires a gradient. None is a tree without tensors."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(tree))
