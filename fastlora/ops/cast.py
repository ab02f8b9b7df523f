"""Cast all adapter matrices of a layer, or of all layers, in few kernel launches.

Adapters are stored in float32 and used in the base's dtype. Casting the 224 matrices of a 1B model
one by one would take about 450 kernels of 2 µs per step. A launch for each layer takes 16 µs,
because it has too few blocks to keep the GPU busy, so the layers are cast together if they can be.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.dispatch import transforms_active

LayerTensors = dict[str, Any]  # projection name -> NamedTuple of tensors


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *leaves):
        ctx.dtypes = [x.dtype for x in leaves]
        return copied(leaves, [dtype] * len(leaves))

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():  # create_graph=True
            return None, *(g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True))
        return None, *copied(grads, ctx.dtypes)


def copied(sources: Any, dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
    """Copies of the tensors in the given dtypes, made in one launch. No gradient flows."""
    copies = [torch.empty_like(x, dtype=d) for x, d in zip(sources, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(sources))  # pyright: ignore[reportPrivateImportUsage]
    return tuple(copies)


def matrices_of(adapter: LayerTensors) -> list[Tensor]:
    """The tensors that `cast` converts, in order: those with two or more dimensions."""
    return [x for record in adapter.values() for x in record if x.dim() >= 2]


def cast(adapter: LayerTensors, dtype: torch.dtype) -> LayerTensors:
    """One layer's adapter with every matrix in `dtype`; returns `adapter` if nothing changes.

    Vectors (biases, magnitudes) keep their dtype: in elementwise operations the wider dtype costs
    nothing. Each gradient has the dtype of its source tensor. We walk the tree by hand because
    torch's tree_flatten took 2 ms of host time per step for 16 layers.
    """
    matrices = matrices_of(adapter)
    if all(x.dtype == dtype for x in matrices):
        return adapter
    if transforms_active() or torch.compiler.is_compiling():
        copies = iter([x.to(dtype) for x in matrices])
    else:
        copies = iter(_Cast.apply(dtype, *matrices))  # pyright: ignore[reportArgumentType]
    return {
        name: type(record)(*(next(copies) if x.dim() >= 2 else x for x in record))
        for name, record in adapter.items()
    }


def cast_layers(
    adapters: Sequence[LayerTensors], dtype: torch.dtype | None
) -> Sequence[LayerTensors]:
    """`cast` of every layer's adapter, all in one launch for each 64 matrices; None: no change.

    The gradients of all layers are cast when the last of them is there.
    """
    if dtype is None:
        return adapters
    named = {f"{i} {name}": x for i, layer in enumerate(adapters) for name, x in layer.items()}
    made = cast(named, dtype)
    if made is named:
        return adapters
    return [{name: made[f"{i} {name}"] for name in layer} for i, layer in enumerate(adapters)]
