"""attach_to_graph(): the input of the first adapted layer as all other layers have it."""

import torch
from torch import Tensor


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
    anchor = torch.empty((), device=x.device, requires_grad=True)
    return _AttachToGraph.apply(x, anchor)  # pyright: ignore[reportReturnType]
