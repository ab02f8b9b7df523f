"""The diagonal of the Fisher information, from gradients of single examples."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.arguments import FUNCTION, Rule, argument_problems, iterable
from fastlora.errors import raise_problems
from fastlora.ops.dispatch import refuse_transforms
from fastlora.research.trees import adapter_problems
from fastlora.runtime.gradients import value_and_grad

BATCHES = iterable("batches to iterate over, such as a list of dicts")


def fisher_diagonal(
    fn: Callable[[Any, Any], Float[Tensor, "b"]], adapter: Any, batches: Iterable[Any]
) -> Any:
    """The mean over all examples of the squared gradient of each, a tree like the adapter.

    With the labels of the data this is the empirical Fisher information. With labels sampled from
    the model's own distribution its expectation is the diagonal of the Fisher information, which is
    that of `ggnvp`'s matrix.

    The gradients of one batch are held together: b times the adapter's memory.

    Args:
        fn: (adapter, batch) -> [b], the loss of each example, such as `FL.row_losses(...)[0]`.
            Value i may depend on example i alone.
        adapter: where to differentiate.
        batches: each is given to `fn`; they may differ in size.

    Raises:
        ValueError: an argument is wrong, or there is no example.
    """
    refuse_transforms("research.fisher_diagonal")
    check_example_arguments("research.fisher_diagonal", fn, adapter, batches)
    squares, examples = sum_of_squares(fn, adapter, batches, "research.fisher_diagonal")
    return tree_map(lambda x: x / examples, squares)


def sum_of_squares(
    fn: Callable[[Any, Any], Tensor], adapter: Any, batches: Iterable[Any], function: str
) -> tuple[Any, int]:
    """(sum over all examples of the squared gradient of each, number of examples).

    Sums are in at least float32.
    """
    wide = lambda x: torch.promote_types(x.dtype, torch.float32)
    total = tree_map(lambda x: torch.zeros_like(x, dtype=wide(x)), adapter)
    examples, each = 0, value_and_grad(fn, per_example=True)
    for batch in batches:
        values, grads = each(adapter, batch)
        total = tree_map(lambda t, g: t + g.to(t.dtype).square().sum(0), total, grads)
        examples += len(values)
    if not examples:
        raise ValueError(f"{function}: batches has no example; a generator can be read only once.")
    return total, examples


def check_example_arguments(
    function: str, fn: Any, adapter: Any, batches: Any, **more: tuple[Any, Rule]
) -> None:
    """Check the arguments of a function that goes through examples; `more` have their own rules.

    Raises:
        ValueError: listing every wrong argument.
    """
    rules = {"fn": (fn, FUNCTION), "batches": (batches, BATCHES), **more}
    problems = argument_problems(rules) + adapter_problems(adapter)
    raise_problems(ValueError, f"{function} cannot use these arguments:", problems)
