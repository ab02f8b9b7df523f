"""Products with second derivatives: the Hessian, and the Gauss-Newton matrix of cross-entropy.

Each function linearises once and returns a function of a vector (a tree like the adapter). The
gradient's graph is kept; a product is one backward pass through it. Nothing of size p x p exists.

With p adapter numbers, l(adapter) a loss and f(adapter) logits [n, v]:

    H v = d/da <dl/da, v>                       hvp (Pearlmutter 1994, Neural Computation 6(1))
    G v = J' M J v,  J = df/da, M = sum over rows i of w_i (diag(p_i) - p_i p_i'),  p = softmax(f)
                                                ggnvp (Schraudolph 2002, Neural Computation 14(7))

J v is read off the transposed product: u -> J' u is linear in u, and its derivative's transpose is
J. So neither product needs forward mode, whose trace or second pass costs more: on the demo model
(float32, 2 x 48 tokens, rank 4, one thread; torch 2.13), in units of one `value_and_grad`,
H v takes 0.9 after 1.0 for the linearisation, and jvp of the gradient takes 3.1 for every product.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import linearize, vjp
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.arguments import FUNCTION, argument_problems, describe, one_of
from fastlora.errors import raise_problems
from fastlora.research.trees import adapter_problems, inner, like, point
from fastlora.runtime.gradients import value_and_grad

Product = Callable[[Any], Any]


def hvp(fn: Callable[[Any], Tensor], adapter: Any, *, method: str = "reverse") -> Product:
    """v -> H v, with H the Hessian of `fn` at the adapter; v and H v are trees like the adapter.

    `fn` runs under a torch.func transform: eagerly, with attention's reference, and all activations
    kept (`spec.resolved`). They stay in memory as long as the returned function does. DoRA's norms
    are constants, as in every gradient of DoRA: H is the Hessian with the norms held fixed.

    Args:
        fn: adapter -> scalar, such as `lambda a: FL.loss(a, base, spec, batch)`. Anything random in
            it needs a fixed seed.
        adapter: where to differentiate.
        method: "reverse": two backward passes, the first one at once, the second for each product.
            "linearize": torch.func.linearize, which traces the gradient once (11 s for the demo
            model, 200 times a gradient) into a torch.fx graph; the products cost about the same.
            "difference": central difference of two fast gradients. It keeps compiled layers,
            kernels and recomputation, but is inexact: relative errors of 4e-4 to 5e-3 were
            measured in float32, and over a 16-bit base it is useless.

    Raises:
        ValueError: an argument is wrong, or `fn` does not return a scalar; in products: the vector
            is not a tree like the adapter.
    """
    rules = {"fn": (fn, FUNCTION), "method": (method, one_of(*_HESSIAN))}
    problems = argument_problems(rules) + adapter_problems(adapter)
    raise_problems(ValueError, "research.hvp cannot use these arguments:", problems)
    adapter = point(adapter)
    product = _HESSIAN[method](fn, adapter)
    return lambda vector: product(like(vector, adapter, "a product of research.hvp"))


def _reverse(fn: Callable[[Any], Tensor], adapter: Any) -> Product:
    # H is symmetric, so the transposed product is the product.
    pull = vjp(lambda a: value_and_grad(fn)(a)[1], adapter)[1]
    return lambda vector: pull(vector)[0]


def _linearized(fn: Callable[[Any], Tensor], adapter: Any) -> Product:
    with _no_advice_about_attributes():
        return linearize(lambda a: value_and_grad(fn)(a)[1], adapter)[1]


@contextmanager
def _no_advice_about_attributes() -> Iterator[None]:
    """Without torch's advice about attributes of a graph, which is for authors of graphs.

    linearize warns once for each constant of its graph, 196 times for the demo model. The end of
    warnings.catch_warnings would also undo what other threads have changed meanwhile.
    """
    filters: Any = warnings.filters
    ignored = ("ignore", re.compile("Attempted to insert a get_attr Node"), UserWarning, None, 0)
    filters.insert(0, ignored)
    try:
        yield
    finally:
        filters.remove(ignored)


def _difference(fn: Callable[[Any], Tensor], adapter: Any) -> Product:
    gradient = value_and_grad(fn)

    def product(vector: Any) -> Any:
        length, size = (float(inner(x, x)) ** 0.5 for x in (vector, adapter))
        if length == 0.0:
            return tree_map(torch.zeros_like, vector)
        # The error of a central difference is least near the cube root of the rounding error.
        eps = max(torch.finfo(x.dtype).eps for x in tree_leaves(adapter))
        step = eps ** (1 / 3) * max(size, 1.0) / length
        up, down = (
            gradient(tree_map(lambda x, v, s=s: x + s * v, adapter, vector))[1]
            for s in (step, -step)
        )
        return tree_map(lambda u, d: (u - d) / (2 * step), up, down)

    return product


_HESSIAN = {"reverse": _reverse, "linearize": _linearized, "difference": _difference}


def ggnvp(
    logits_fn: Callable[[Any], Float[Tensor, "*n v"]],
    adapter: Any,
    *,
    weights: Float[Tensor, "*n"] | None = None,
) -> Product:
    """v -> G v, with G the Gauss-Newton matrix of the cross-entropy of logits.

    G is positive semi-definite. It is the Hessian without the second derivative of the logits, and
    the Fisher information under the model's own distribution; it does not depend on labels.
    Softmax and M run in at least float32. Memory and transforms: as `hvp`; the logits are held
    whole, so let `logits_fn` return the rows that matter, `FL.forward(...)[mask]`.

    Args:
        logits_fn: adapter -> logits [..., v].
        adapter: where to differentiate.
        weights: of each row of logits; None: 1 / the number of rows, as in a mean loss.

    Raises:
        ValueError: an argument is wrong, or `logits_fn` does not return one tensor of logits; in
            products: the vector is not a tree like the adapter.
    """
    problems = argument_problems({"logits_fn": (logits_fn, FUNCTION)}) + adapter_problems(adapter)
    raise_problems(ValueError, "research.ggnvp cannot use these arguments:", problems)
    adapter = point(adapter)
    logits, push, pull = linear_map(logits_fn, adapter, "research.ggnvp")
    weight = _row_weights(logits, weights)
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)

    def product(vector: Any) -> Any:
        moved = push(like(vector, adapter, "a product of research.ggnvp")).to(p.dtype)
        centred = p * (moved - (p * moved).sum(-1, keepdim=True))
        return pull((weight * centred).to(logits.dtype))

    return product


def linear_map(
    logits_fn: Callable[[Any], Tensor], adapter: Any, function: str
) -> tuple[Tensor, Callable[[Any], Tensor], Callable[[Tensor], Any]]:
    """(logits, v -> J v, u -> J' u), with J the derivative of `logits_fn` at the adapter.

    The products keep the two graphs that they run backward. `function` is the caller's name.

    Raises:
        ValueError: `logits_fn` does not return one floating-point tensor [..., v].
    """

    def logits_of(a: Any) -> Tensor:
        logits = logits_fn(a)
        if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim():
            return logits
        raise ValueError(
            f"{function} needs a logits_fn that returns logits, one floating-point tensor [..., v],"
            f" got {describe(logits)}."
        )

    value, pull = vjp(logits_of, adapter)[:2]
    # Zeros serve as well as any u: J' u is linear in u, so its derivative is the same everywhere.
    push = vjp(lambda u: vjp(logits_of, adapter)[1](u)[0], torch.zeros_like(value))[1]
    return value, lambda v: push(v)[0], lambda u: pull(u)[0]


def _row_weights(logits: Tensor, weights: Any) -> Tensor | float:
    """The weight of each row [*n, 1], or one weight for all rows."""
    rows = logits.shape[:-1]
    if weights is None:
        return 1.0 / max(rows.numel(), 1)
    if not isinstance(weights, Tensor) or weights.shape != rows:
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"research.ggnvp: weights must be a tensor {list(rows)}, got {shape}.")
    return weights.unsqueeze(-1)
