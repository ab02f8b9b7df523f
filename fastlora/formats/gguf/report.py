"""The reports of written GGUF files."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A written file, run by llama.cpp, beside the model that it was written from."""

    # Largest difference of log-probabilities: the ten likeliest tokens at every position, as long
    # as both have chosen the same ids.
    logprob_difference: float
    equal_ids: int  # greedy ids before the first difference, of all prompts together
    greedy_ids: int  # greedy ids of llama.cpp, of all prompts together
    texts: int  # texts that were tokenised by both; 0 for an adapter
    equal_texts: int  # texts with equal ids


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFReport:
    """A written GGUF file."""

    path: Path
    bytes: int  # of the file
    notes: tuple[str, ...] = ()  # ways in which llama.cpp's results will differ, in sentences
    command: str | None = None  # for a K-quant: the command that makes it from the written file
    verification: Verification | None = None  # None: verify was False


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaReport:
    """A written folder for Ollama."""

    path: Path  # the Modelfile
    bytes: int  # of all files
    model: GGUFReport
    adapter: GGUFReport | None  # None: the model has no adapter
