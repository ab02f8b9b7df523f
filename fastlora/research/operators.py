"""Products as SciPy's linear operators, for eigsh, cg, svds and curvlinops."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastlora.arguments import FUNCTION, argument_problems
from fastlora.errors import lacks_extra, raise_problems
from fastlora.ops.dispatch import refuse_transforms
from fastlora.research.trees import adapter_problems, like, ravel, unravel


def as_linear_operator(fn: Callable[[Any], Any], adapter: Any) -> Any:
    """A scipy.sparse.linalg.LinearOperator [p, p] over the flattened adapter.

    Its dtype is NumPy's float64 if a leaf of the adapter is, else float32. Vectors are copied to
    the adapter's device and back. `ravel` and `unravel` give the same order of the numbers.

        H = research.as_linear_operator(research.hvp(loss, adapter), adapter)
        values, vectors = scipy.sparse.linalg.eigsh(H, k=3)
        direction = research.unravel(vectors[:, -1], adapter)

    Args:
        fn: a symmetric linear function of a tree like the adapter, which returns another one: the
            result of `hvp` or `ggnvp`, or a function of them (`lambda v: ...`).
        adapter: p numbers.

    Raises:
        ValueError: an argument is wrong; in products: `fn` returns something other than a tree like
            the adapter.
        ModuleNotFoundError: SciPy is not installed.
    """
    refuse_transforms("research.as_linear_operator")
    problems = argument_problems({"fn": (fn, FUNCTION)}) + adapter_problems(adapter)
    raise_problems(ValueError, "research.as_linear_operator cannot do this:", problems)
    try:
        from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415  an extra, and slow
    except ModuleNotFoundError as error:
        raise lacks_extra("research.as_linear_operator", "scipy", "research", error) from error
    leaves = tree_leaves(adapter)
    p = sum(x.numel() for x in leaves)
    wide = any(x.dtype == torch.float64 for x in leaves)
    dtype = torch.float64 if wide else torch.float32

    def matvec(vector: Any) -> Any:
        product = fn(unravel(vector.reshape(-1), adapter))
        product = like(product, adapter, "as_linear_operator(fn), fn being hvp's result,")
        return ravel(product).detach().to("cpu", dtype).numpy()

    name = str(dtype).removeprefix("torch.")
    return LinearOperator((p, p), matvec=matvec, rmatvec=matvec, dtype=name)  # pyright: ignore
