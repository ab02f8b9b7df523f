"""Prompts into the cache: each distinct prompt is read once, and its other rows get copies."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from fastlora.generation.cache import Cache
from fastlora.generation.forward import prefill
from fastlora.generation.kernel_layer import StepKernels
from fastlora.generation.prepare import PreparedModel

# Prompts are prefilled together up to this many tokens, padding included: more would be no faster
# and need memory for their activations.
_PREFILL_TOKENS = 8192


class Prefix(NamedTuple):
    """A prompt without its last token, which is the input of the row's first step."""

    ids: tuple[int, ...]
    adapter_id: int


class Prefixes:
    """Which slot holds the keys and values of which prompt, from index 0 on.

    A slot holds them after its row has ended, too, until another row gets the slot.
    """

    def __init__(self, model: PreparedModel, cache: Cache) -> None:
        """No slot holds a prompt."""
        self.model, self.cache = model, cache
        self.of_slot: dict[int, Prefix] = {}

    def choose_slots(self, wanted: Sequence[Prefix], taken: Collection[int]) -> list[int]:
        """For each row a slot that is not taken: one that holds its prompt, or the lowest."""
        free = [i for i in range(self.cache.slots) if i not in taken]
        chosen: list[int | None] = []
        for key in wanted:
            holder = next((i for i in free if key.ids and self.of_slot.get(i) == key), None)
            chosen.append(holder)
            if holder is not None:
                free.remove(holder)
        # Low slots first: a step runs on all slots up to the last one in use.
        return [free.pop(0) if slot is None else slot for slot in chosen]

    def fill(self, wanted: Sequence[Prefix], slots: Sequence[int], kernels: StepKernels) -> None:
        """Bring prompts into their slots of the cache. `kernels` is that of `prefill`."""
        targets: dict[Prefix, list[int]] = defaultdict(list)
        for key, slot in zip(wanted, slots, strict=True):
            if key.ids:
                targets[key].append(slot)
        # A slot that gets another prompt cannot be a source.
        holders = {
            key: slot
            for slot, key in self.of_slot.items()
            if slot not in slots or slot in targets[key]
        }
        missing = [(key, same[0]) for key, same in targets.items() if same and key not in holders]
        for slot in slots:
            self.forget(slot)
        self._prefill(missing, kernels)
        holders |= dict(missing)
        for key, same in targets.items():
            for slot in same:
                if slot != holders[key]:
                    self.cache.copy(holders[key], slot, len(key.ids))
                self.of_slot[slot] = key

    def read_again(self, key: Prefix, slot: int, kernels: StepKernels) -> None:
        """Write all keys and values of a row anew. `kernels` is that of `prefill`."""
        self._prefill([(key, slot)], kernels)
        self.of_slot[slot] = key

    def forget(self, slot: int) -> None:
        """The slot holds no prompt any more."""
        self.of_slot.pop(slot, None)

    def _prefill(self, missing: Sequence[tuple[Prefix, int]], kernels: StepKernels) -> None:
        """Run the model over prompts, each with its slot; rows of similar length together."""
        rest = sorted(missing, key=lambda entry: len(entry[0].ids), reverse=True)
        device = self.model.base["norm"].device
        tensor = lambda x: torch.tensor(x, device="cpu").to(device)
        while rest:
            t = len(rest[0][0].ids)
            together, rest = rest[: (n := max(1, _PREFILL_TOKENS // t))], rest[n:]
            prefill(
                self.model,
                self.cache,
                [slot for _, slot in together],
                tensor([[*key.ids, *[0] * (t - len(key.ids))] for key, _ in together]),
                tensor([len(key.ids) + 1 for key, _ in together]),
                tensor([key.adapter_id for key, _ in together]),
                kernels,
            )
