"""Sampling: which token comes next, given the logits. The meaning of all settings is transformers'.

For each row: repetition penalty, then temperature, top-k and top-p, then one draw.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.arguments import Rule, number, optional, setting, whole_number

# Below the first, quotients of logits may overflow float32; the second has a float32 reciprocal.
_LOW_TEMPERATURE, _LEAST_TEMPERATURE = 1e-5, 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = setting(number(low=0), 0.0)  # 0 takes the likeliest token
    top_k: int | None = setting(optional(whole_number(1)), None)
    top_p: float | None = setting(optional(number(above=0, high=1)), None)
    repetition_penalty: float = setting(number(above=0), 1.0)


SEED = Rule(  # an int or one of NumPy's integers, as torch.Generator.manual_seed accepts them
    lambda x: isinstance(x, Integral) and not isinstance(x, bool) and 0 <= int(x) < 2**64,
    "a whole number in [0, 2**64)",
)


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A private random generator; None seeds it from the operating system's entropy."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(seed))
    return generator


def seen_ids(
    input_ids: Int[Tensor, "b t"], real: Int[Tensor, "b t"], vocab_size: int
) -> Bool[Tensor, "b v"]:
    """Which ids occur among a row's real tokens. Padding does not count."""
    counts = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.int64, device=input_ids.device)
    return counts.scatter_add(1, input_ids, real.long()) > 0


def choose(
    logits: Float[Tensor, "b v"],
    seen: Bool[Tensor, "b v"] | None,
    sampling: Sampling,
    generator: torch.Generator,
) -> Int[Tensor, "b"]:
    """The next token of every row.

    Args:
        logits: of any dtype; the choice is made in float32.
        seen: which ids each row has already; None if there is no repetition penalty.
        sampling: how to choose.
        generator: advanced by one draw, unless the temperature is 0.
    """
    scores = logits.float()
    if seen is not None:
        scores = penalised(scores, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    return torch.multinomial(filtered(scores, sampling).softmax(-1), 1, generator=generator)[:, 0]


def penalised(
    scores: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], penalty: float
) -> Float[Tensor, "b v"]:
    """Scores with seen tokens made less likely (Keskar et al. 2019, arXiv:1909.05858, 4.1)."""
    lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, lowered, scores)


def filtered(scores: Float[Tensor, "b v"], sampling: Sampling) -> Float[Tensor, "b v"]:
    """Scores after temperature, top-k and top-p (Holtzman et al. 2020, arXiv:1904.09751).

    Excluded tokens have score -inf. Tokens that tie with the k-th are kept.
    """
    temperature = sampling.temperature
    if temperature < _LOW_TEMPERATURE:  # then the largest quotient is 0
        scores = scores - scores.amax(-1, keepdim=True)
        temperature = max(temperature, _LEAST_TEMPERATURE)
    scores = scores / temperature
    if sampling.top_k is not None:
        kth = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        # Keep a token if all likelier ones together stay below top_p; so the likeliest is kept.
        ordered, index = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = before >= sampling.top_p
        beyond[:, 0] = False  # a top_p below the smallest float32 is 0 here
        cut = torch.zeros_like(beyond).scatter(-1, index, beyond)
        scores = scores.masked_fill(cut, -math.inf)
    return scores
