"""The keys and values of all rows: one slot for each row, with its tokens at indices 0, 1, ..."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.config import LlamaConfig

# A new cache has room for this many tokens, or as many as fit into so many bytes. Growing costs as
# much time as some dozens of steps on a GPU, because their graphs are recorded again.
_FIRST_LENGTH, _FIRST_BYTES = 256, 2**30


class Cache:
    """Keys and values of `slots` rows, in tensors [slots, kv, length, hd] for each layer.

    New tensors hold zeros: attention gives an index behind a row's tokens the weight 0, and 0 times
    an uninitialised NaN would be NaN.
    """

    def __init__(
        self, config: LlamaConfig, like: Tensor, slots: int, max_length: int, *, short: bool = True
    ) -> None:
        """Allocate a cache that may be shorter than `max_length`.

        Args:
            config: the model's.
            like: the cache has its dtype and device.
            slots: number of rows.
            max_length: tokens of the longest row; the cache never grows beyond it.
            short: whether a step reads all indices of a slot, so that few are better.
        """
        self.config, self.like, self.slots = config, like, slots
        self.max_length = max_length
        fits = 0 if short else _FIRST_BYTES // (slots * slot_bytes(config, like.dtype, 1))
        self.length = min(max(_FIRST_LENGTH, fits), max_length)
        self.k, self.v = self._zeros(), self._zeros()

    def _zeros(self) -> list[Float[Tensor, "slots kv s hd"]]:
        config = self.config
        shape = (self.slots, config.num_key_value_heads, self.length, config.head_dim)
        return [self.like.new_zeros(shape) for _ in range(config.num_hidden_layers)]

    def grow(self, length: int) -> bool:
        """Make room for `length` tokens in each slot, by doubling. Whether tensors were replaced.

        Layer by layer, so that one layer's old and new tensors exist together and not all.
        """
        if length <= self.length:
            return False
        assert length <= self.max_length, (length, self.max_length)
        while self.length < length:
            self.length = min(2 * self.length, self.max_length)
        for tensors in (self.k, self.v):
            for i, old in enumerate(tensors):
                new = old.new_zeros(*old.shape[:2], self.length, old.shape[3])
                new[:, :, : old.shape[2]] = old
                tensors[i] = new
        return True

    def rows(self, slots: Sequence[int]) -> slice | Int[Tensor, "b"]:
        """An index of some slots: a slice if they are consecutive, which is fast to write to."""
        if [*slots] == [*range(slots[0], slots[0] + len(slots))]:
            return slice(slots[0], slots[0] + len(slots))
        return torch.tensor(slots, device=self.like.device)

    def write(
        self,
        layer: int,
        rows: slice | Int[Tensor, "b"],
        k: Float[Tensor, "b kv t hd"],
        v: Float[Tensor, "b kv t hd"],
    ) -> None:
        """Set the first t indices of some slots; `rows` is that of `self.rows`."""
        t = k.shape[2]
        self.k[layer][rows, :, :t] = k
        self.v[layer][rows, :, :t] = v

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for tensors in (self.k, self.v):
            for x in tensors:
                x[target, :, :length] = x[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot that may hold NaN."""
        for tensors in (self.k, self.v):
            for x in tensors:
                x[slot].zero_()


def slot_bytes(config: LlamaConfig, dtype: torch.dtype, length: int) -> int:
    """Memory of one slot of `length` tokens."""
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * length * config.head_dim
    return elements * dtype.itemsize
