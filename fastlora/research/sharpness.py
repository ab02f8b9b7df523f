"""Sharpness-aware minimisation: the gradient at the worst nearby point.

SAM (Foret et al. 2021, arXiv:2010.01412) minimises the largest loss within a ball of radius rho
around the adapter, to first order:

    e = rho g / |g|,  g = dl/da at the adapter;     the step uses dl/da at adapter + e
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.arguments import FUNCTION, check_arguments, number
from fastlora.research.trees import inner
from fastlora.runtime.gradients import value_and_grad


def sam_value_and_grad(
    fn: Callable[..., Tensor], *, rho: float = 0.05
) -> Callable[..., tuple[Tensor, Any]]:
    """(adapter, *args) -> (value at the adapter, gradient at the worst point within rho).

    Takes the place of `fastlora.value_and_grad` in a training loop, at twice the cost. Both
    gradients take the fast path. If the gradient is zero, so is the step e.

    Args:
        fn: a function of a tree of tensors and any other arguments. It is called twice with the
            same arguments; pass a dropout seed among them, so that both calls have the same masks.
        rho: radius of the ball, in the Euclidean norm over all leaves together.

    Raises:
        ValueError: an argument is wrong, or what `value_and_grad` raises.
    """
    rules = {"fn": (fn, FUNCTION), "rho": (rho, number(low=0.0))}
    check_arguments("research.sam_value_and_grad", **rules)
    plain = value_and_grad(fn)

    def at_worst(params: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        value, grads = plain(params, *args, **kwargs)
        norm = inner(grads, grads).sqrt()
        scale = rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        worst = tree_map(lambda x, g: (x + scale * g).to(x.dtype), params, grads)
        return value, plain(worst, *args, **kwargs)[1]

    return at_worst
