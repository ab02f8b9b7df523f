"""sampling."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; the rest is transformers' meaning."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def problems(self) -> list[str]:
        """Every value that cannot be, as a sentence."""
        checks = {
            f"temperature must be a number >= 0, got {self.temperature!r}": self.temperature >= 0
            and math.isfinite(self.temperature),
            f"top_k must be a whole number >= 1 or None, got {self.top_k!r}": self.top_k is None
            or (isinstance(self.top_k, int) and self.top_k >= 1),
            f"top_p must lie in (0, 1] or be None, got {self.top_p!r}": self.top_p is None
            or 0 < self.top_p <= 1,
            f"repetition_penalty must be > 0, got {self.repetition_penalty!r}": 0
            < self.repetition_penalty
            < math.inf,
        }
        return [sentence for sentence, holds in checks.items() if not holds]


def penalised(
    scores: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], penalty: float
) -> Float[Tensor, "b v"]:
    """Tokens already seen, made less likely (Keskar et al. 2019, arXiv:1909.05858, 4.1)."""
    lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, lowered, scores)


def filtered(scores: Float[Tensor, "b v"], sampling: Sampling) -> Float[Tensor, "b v"]:
    """Scores after temperature, top-k and top-p (Holtzman et al. 2020, arXiv:1904.09751), in that
    order; what is cut off is -inf."""
    scores = scores / sampling.temperature
    if sampling.top_k is not None:
        kth = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(
            -1, index, before >= sampling.top_p
        )
        scores = scores.masked_fill(cut, -math.inf)
    return scores


def choose(
    logits: Float[Tensor, "b v"],
    seen: Bool[Tensor, "b v"] | None,
    sampling: Sampling,
    generator: torch.Generator,
) -> Int[Tensor, "b"]:
    """The next token of every row."""
    scores = logits.float()
    if seen is not None:
        scores = penalised(scores, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    return torch.multinomial(filtered(scores, sampling).softmax(-1), 1, generator=generator)[:, 0]
