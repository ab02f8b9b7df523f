"""Trees of tensors: random values, relative errors, equality of bits."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def randomised(tree: Any, seed: int, std: float = 0.2) -> Any:
    """A tree of the same shapes and dtypes, drawn from a normal distribution."""
    gen = torch.Generator().manual_seed(seed)
    return tree_map(lambda x: std * torch.randn(x.shape, generator=gen, dtype=x.dtype), tree)


def token_ids(*shape: int, seed: int = 0, vocab_size: int = 24) -> Tensor:
    """Random ids."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Any, expected: Any) -> float:
    """Largest over the leaves of |actual - expected|max / |expected|max; inf where a leaf is zero
    that should not be, so that a dropped gradient cannot pass."""
    errors = []
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    for a, e in pairs:
        assert a.shape == e.shape
        errors.append(((a - e).abs().max() / e.abs().max()).item() if e.any() else float("inf"))
    return max(errors)


def same_bits(actual: Any, expected: Any) -> bool:
    """Whether two trees are equal bit for bit, signed zeros apart."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    return all(torch.equal(a, e) for a, e in pairs)


def stacked(trees: list[Any]) -> Any:
    """One tree whose leaves are [n, ...], of n trees of the same shapes."""
    return tree_map(lambda *xs: torch.stack(xs), *trees)
