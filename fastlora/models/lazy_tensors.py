"""LazyTensors: the tensors of a base by their names on disk, if its layers must be fetched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class LazyTensors(Mapping[str, Any]):
    """Name -> tensor, made when it is asked for. Iterate in order: then each layer comes once."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Any]) -> None:
        """Nothing is made yet.

        Args:
            names: of all tensors, in the order of layers.
            make: returns the tensor of a name.
        """
        self.names, self.make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
