"""Walk nested dicts, tuples and lists, faster than torch's pytree.

tree_flatten also builds a description of the tree. That takes 2 ms of the host's time for the
adapters of a 1B model, half of a small step.
"""

from collections.abc import Iterator
from typing import Any


def leaves(tree: Any) -> Iterator[Any]:
    """Everything that is not a dict, list, tuple or NamedTuple, depth first."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree


def with_leaves(tree: Any, new: Iterator[Any]) -> Any:
    """The same tree with the leaves `new`, given in the order of `leaves`."""
    if isinstance(tree, dict):
        return {name: with_leaves(item, new) for name, item in tree.items()}
    if isinstance(tree, tuple | list):
        items = [with_leaves(item, new) for item in tree]
        if isinstance(tree, list):
            return items
        # A NamedTuple takes its fields as arguments, a tuple takes one iterable.
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return next(new)
