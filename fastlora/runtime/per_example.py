"""PerExample: what `fn` gets under value_and_grad(fn, per_example=...) in place of its tree.

The functions of functional.py know which rows of a batch belong to which example. Their backward
pass gives each example's gradient, or a quantity of it, to the sinks of this record.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastlora.arguments import RANDOM_SEED, Rule, describe, setting, setting_problems, whole_number
from fastlora.errors import raise_problems
from fastlora.ops.count_sketch import count_sketch
from fastlora.ops.dropout import fold
from fastlora.ops.linear.group_gradients import Sink


@dataclass(frozen=True, kw_only=False, eq=False)
class Sketch:
    """Asks for count sketches of gradients: k numbers for each example (ops/count_sketch.py).

    The inner product of two sketches with equal k and seed is an estimate, without bias, of the
    inner product of the gradients. Its standard deviation is at most sqrt(2 / k) times the product
    of their norms. A sketch is linear in the gradient.

    Raises:
        ValueError: an argument has another value than its rule allows.
    """

    k: int = setting(whole_number(1, 2**31))
    """Numbers in a sketch."""
    seed: int = setting(RANDOM_SEED, 0)
    """Seed of the signs and buckets, which also depend on the leaf and the element."""
    weights: Any = setting(Rule(lambda x: True, "a tree"), None)
    """A tree like the adapter, with which gradients are multiplied element by element before they
    are sketched, such as 1 / (sqrt(v) + eps) of Adam; None: without factors."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        heading = "fastlora.Sketch cannot use these arguments:"
        raise_problems(ValueError, heading, setting_problems(self))

    def of(self, tree: Any) -> Float[Tensor, "b k"]:
        """The sketches of b trees like the adapter, whose leaves are [b, ...].

        For a tree of per-example gradients they equal the result of
        value_and_grad(per_example=self), up to rounding.

        Raises:
            ValueError: `weights` does not fit the tree.
        """
        leaves, structure = tree_flatten(tree)
        weights = self.weights_of(structure, [x[0] for x in leaves])
        keys = self.keys(len(leaves), leaves[0].device)
        total = torch.zeros((), dtype=torch.float32, device=leaves[0].device)
        for x, key, weight in zip(leaves, keys, weights, strict=True):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x if weight is None else x * weight
            total = total + count_sketch(x.flatten(1), key, self.k)
        return total

    def keys(self, n: int, device: torch.device) -> list[Tensor]:
        """The key of each of n leaves."""
        seed = torch.full((), self.seed % 2**63, dtype=torch.int64, device=device)
        return [*fold(seed, torch.arange(n, device=device)).unbind()]

    def weights_of(self, structure: Any, leaves: list[Tensor]) -> list[Tensor | None]:
        """The factors of each leaf, or Nones.

        Raises:
            ValueError: they do not fit.
        """
        if self.weights is None:
            return [None] * len(leaves)
        weights, own = tree_flatten(self.weights)
        shapes = [tuple(getattr(x, "shape", ())) for x in weights]
        if own != structure or shapes != [tuple(x.shape) for x in leaves]:
            raise ValueError(
                "Sketch(weights=...): expected a tree of the structure and shapes of the first"
                " argument of fn."
            )
        return weights


HOW = Rule(
    lambda x: x is True or (type(x) is str and x == "norms") or isinstance(x, Sketch),
    'False, True, "norms" or a fastlora.Sketch',
)

_STANDS_FOR_ADAPTER = (
    "under per_example, the first argument of fn stands for the adapter, and its tensors cannot be"
    " read: pass it to functions of fastlora.functional. Add the gradient of any other term, such"
    " as a penalty on the adapter, to the result."
)


class PerExample:
    """Stands for a tree of tensors whose gradient is computed for each example.

    It may only be passed to functions of functional.py, as their first argument, in place of the
    tree. n, the number of examples, is known from the first of these calls on.
    """

    def __init__(self, tree: Any, how: bool | str | Sketch) -> None:
        """Prepare. Sinks are made when n is known.

        Args:
            tree: of floating-point tensors.
            how: what to compute: a value that HOW accepts.
        """
        leaves, self.structure = tree_flatten(tree)
        self.leaves = [x.detach() for x in leaves]
        self.how, self.n = how, None
        self._each: list[Tensor] | None = None
        self._probe: Tensor | None = None
        self._calls = 0

    @property
    def tree(self) -> Any:
        """The tree, whose tensors require no gradient."""
        return tree_unflatten(self.leaves, self.structure)

    def __getitem__(self, key: Any) -> Any:
        raise TypeError(f"{_STANDS_FOR_ADAPTER} It cannot be indexed.")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{_STANDS_FOR_ADAPTER} It has no attribute {name!r}.")

    def begin(self, n: int) -> None:
        """A function of functional.py runs n examples.

        Raises:
            ValueError: an earlier call had another number of examples, or norms are computed and
                this is the second call: the norm of a sum does not follow from those of its parts.
        """
        if self.n is not None and n != self.n:
            raise ValueError(
                f"per_example: an earlier call in fn had {self.n} examples, and this one has {n};"
                " pass adapter_ids, the number of each row's example."
            )
        if self.how == "norms" and self._calls:
            raise ValueError(
                'per_example="norms": fn calls functions of fastlora.functional twice, and the norm'
                " of a sum does not follow from its parts. Pass all rows in one call, with"
                " adapter_ids, the number of each row's example; or run what needs no gradient"
                " under torch.no_grad()."
            )
        self.n, self._calls = n, self._calls + 1

    def stack(self) -> Any:
        """The tree with n equal copies in every leaf [n, ...], each with a gradient of its own."""
        if self._each is None:
            assert self.n is not None
            expanded = [x.expand(self.n, *x.shape) for x in self.leaves]
            self._each = [x.detach().requires_grad_() for x in expanded]
        return tree_unflatten(self._each, self.structure)

    def sinks(self) -> Any:
        """The tree with a Sink in place of each leaf."""
        if self.how is True:
            each = tree_leaves(self.stack())
            return tree_unflatten([Sink(x) for x in each], self.structure)
        probe = self._get_probe()
        if not isinstance(self.how, Sketch):
            return tree_unflatten([Sink(None, probe)] * len(self.leaves), self.structure)
        keys = self.how.keys(len(self.leaves), probe.device)
        weights = self.how.weights_of(self.structure, self.leaves)
        pairs = zip(keys, weights, strict=True)
        return tree_unflatten([Sink(None, probe, *pair) for pair in pairs], self.structure)

    def _get_probe(self) -> Tensor:
        if self._probe is None:
            assert self.n is not None
            shape = (self.n, self.how.k) if isinstance(self.how, Sketch) else (self.n,)
            x = self.leaves[0]
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._probe = torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)
        return self._probe

    def results(self, values: Float[Tensor, "n"]) -> Any:
        """The gradients of `values`, or their norms or sketches, from one backward pass."""
        n = len(values)
        of_each, of_probe = self._differentiated(values)
        if self.how is True:
            of_each = of_each or [x.new_zeros(n, *x.shape) for x in self.leaves]
            return tree_unflatten(of_each, self.structure)
        wide = torch.promote_types(self.leaves[0].dtype, torch.float32)
        if isinstance(self.how, Sketch):
            total = values.new_zeros(n, self.how.k, dtype=wide) if of_probe is None else of_probe
            if of_each:  # of rows that ran under torch.vmap
                total = total + self.how.of(tree_unflatten(of_each, self.structure))
            return total
        total = values.new_zeros(n, dtype=wide) if of_probe is None else of_probe
        return sum((x.to(wide).flatten(1).square().sum(1) for x in of_each), total).sqrt()

    def _differentiated(self, values: Float[Tensor, "n"]) -> tuple[list[Tensor], Tensor | None]:
        """The gradients of the leaves of `stack`, and of the probe if there is one."""
        each = self._each or []
        wanted = each if self._probe is None else [*each, self._probe]
        if values.requires_grad and wanted:
            total = values.sum()
            grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        else:
            grads = [torch.zeros_like(x) for x in wanted]
        return [*grads[: len(each)]], None if self._probe is None else grads[-1]


def check_values(values: Any, n: int | None) -> None:
    """Check the result of fn.

    Raises:
        ValueError: it is not one value for each of n examples.
    """
    if isinstance(values, Tensor) and values.dim() == 1 and n in (None, len(values)):
        return
    given = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else describe(values)
    expected = "a tensor [b]" if n is None else f"a tensor [{n}]"
    raise ValueError(
        f"per_example: fn must return one value for each example, {expected}; got {given}."
    )
