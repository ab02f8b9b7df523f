"""What the host knows of the rows that run: their settings, prompts and new tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastlora.generation.kernel_layer import StepKernels
from fastlora.generation.prefixes import Prefix, Prefixes
from fastlora.generation.rows import REPORTED_STEPS
from fastlora.generation.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """How one row is generated."""

    max_new_tokens: int
    sampling: Sampling
    seed: int | None  # None draws fresh entropy
    stop: tuple[int, ...]  # ids that end the row; the stop id is part of the result
    adapter_id: int = 0  # of a stack of adapters
    logprobs: bool = False
    alternatives: int = 0  # how many likeliest tokens are reported for each new one, at most 20


class HostRow:
    """The host's copy of a row's state."""

    def __init__(self, prompt: list[int], settings: RowSettings) -> None:
        """A row that has no new token yet."""
        self.prompt, self.settings = prompt, settings
        self.new: list[int] = []

    @property
    def made(self) -> int:
        """Number of new tokens."""
        return len(self.new)

    @property
    def cached(self) -> int:
        """Tokens in the cache. The newest token is not there yet."""
        return len(self.prompt) - 1 + self.made

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self.settings.max_new_tokens - self.made


def read_outgrown(
    running: Mapping[int, HostRow], trained: int, prefixes: Prefixes, kernels: StepKernels
) -> int:
    """Read rows again that outgrow LongRoPE's trained length with their next token, because the
    angles of all their keys change then, as in transformers (modeling_phi3.py, v5.23).

    Args:
        running: slot -> its row.
        trained: the length.
        prefixes: of the engine.
        kernels: of `forward.prefill`.

    Returns:
        How many steps no other row outgrows it, at most 16.
    """
    until = REPORTED_STEPS
    for slot, row in running.items():
        if row.cached < trained:
            until = min(until, trained - row.cached)
        elif row.cached == trained and row.made:
            key = Prefix(tuple([*row.prompt, *row.new][:-1]), row.settings.adapter_id)
            prefixes.read_again(key, slot, kernels)
    return until
