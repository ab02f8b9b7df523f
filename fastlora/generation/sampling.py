"""Sampling: which token comes next, given the logits. The meaning of all settings is transformers'.

For each row: repetition penalty, then temperature, top-k, top-p and min-p, then one draw. Rows have
settings of their own, which lie in tensors, so that one recorded step serves all their values.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from fastlora.arguments import Rule, number, optional, setting, whole_number
from fastlora.ops.dropout import fold

# Below the first, quotients of logits may overflow float32; the second has a float32 reciprocal.
_LOW_TEMPERATURE, _LEAST_TEMPERATURE = 1e-5, 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = setting(number(low=0), 0.0)  # 0 takes the likeliest token
    top_k: int | None = setting(optional(whole_number(1)), None)
    top_p: float | None = setting(optional(number(above=0, high=1)), None)
    min_p: float | None = setting(optional(number(low=0, high=1)), None)
    repetition_penalty: float = setting(number(above=0), 1.0)


def _is_seed(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and 0 <= int(x) < 2**64


SEED = Rule(_is_seed, "a whole number in [0, 2**64)")  # Python's or NumPy's


class RowSampling(NamedTuple):
    """The settings of all rows. Rows that do not use a filter have a value that removes nothing."""

    temperature: Float32[Tensor, "b"]  # 0 takes the likeliest token
    top_k: Int[Tensor, "b"]  # 0: no top-k
    rest: Float32[Tensor, "b"]  # 1 - top_p; -1: no top-p
    min_p: Float32[Tensor, "b"]
    penalty: Float32[Tensor, "b"]
    seed: Int[Tensor, "b"]


class Variant(NamedTuple):
    """The needs of all rows of a step. Each variant is a different sequence of operations."""

    draws: bool = False  # False: every row takes its likeliest token
    cold: bool = False  # some row's temperature is tiny
    top_k: int = 0  # at least the largest top_k of all rows; 0: no row has one
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False
    logprobs: bool = False
    alternatives: bool = False  # some row asks for the likeliest tokens


def variant_of(
    rows: Sequence[Sampling], logprobs: bool, vocab_size: int, alternatives: bool = False
) -> Variant:
    """The least that serves all rows. top_k is rounded up to a power of two: fewer variants."""
    draws = [x for x in rows if x.temperature > 0]
    top_k = max((x.top_k or 0 for x in draws), default=0)
    return Variant(
        draws=bool(draws),
        cold=any(x.temperature < _LOW_TEMPERATURE for x in draws),
        top_k=min(1 << (top_k - 1).bit_length(), vocab_size) if top_k else 0,
        top_p=any(x.top_p is not None and x.top_p < 1 for x in draws),
        min_p=any(bool(x.min_p) for x in draws),
        penalty=any(x.repetition_penalty != 1.0 for x in rows),
        logprobs=logprobs,
        alternatives=alternatives,
    )


def row_values(sampling: Sampling, seed: int, vocab_size: int) -> tuple[float | int, ...]:
    """One row's entries in `RowSampling`, in its order."""
    top_p, top_k = sampling.top_p, sampling.top_k
    signed = seed - 2**64 if seed >= 2**63 else seed
    return (
        sampling.temperature,
        0 if top_k is None else min(top_k, vocab_size),
        -1.0 if top_p is None or top_p == 1 else 1 - top_p,
        sampling.min_p or 0.0,
        sampling.repetition_penalty,
        signed,
    )


def row_sampling(rows: int, device: torch.device) -> RowSampling:
    """Settings of rows that take the likeliest token; `row_values` are written into them."""
    new = lambda value: torch.full((rows,), value, dtype=torch.float32, device=device)
    whole = lambda: torch.zeros(rows, dtype=torch.int64, device=device)
    return RowSampling(new(0.0), whole(), new(-1.0), new(0.0), new(1.0), whole())


def row_seeds(seed: int | None, rows: int) -> list[int]:
    """A seed for each row of a batch; None draws them from the operating system's entropy."""
    if seed is None:
        return [secrets.randbits(63) for _ in range(rows)]
    signed = int(seed) - 2**64 if int(seed) >= 2**63 else int(seed)
    index = 2 * torch.arange(rows, device="cpu")
    key = torch.tensor(signed, device="cpu")
    return ((fold(key, index) << 31) ^ fold(key, index + 1)).tolist()


def seen_ids(ids: Sequence[int], vocab_size: int, device: torch.device) -> Bool[Tensor, "v"]:
    """Which ids occur in a prompt."""
    seen = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
    seen[torch.tensor(ids, device="cpu")] = True
    return seen.to(device)


def choose(
    logits: Float[Tensor, "b v"],
    seen: Bool[Tensor, "b v"] | None,
    rows: RowSampling,
    index: Int[Tensor, "b"],
    variant: Variant,
) -> Int[Tensor, "b"]:
    """The next token of every row.

    A row's draw depends on its logits, its settings and `index`, and on no other row.

    Args:
        logits: of any dtype; the choice is made in float32.
        seen: which ids each row has already; needed if the variant has a penalty.
        rows: how to choose.
        index: the number of the new token in its row: each has another random number.
        variant: at least what the rows need.
    """
    scores = logits
    if variant.penalty:
        assert seen is not None, "a repetition penalty needs the ids that were seen"
        scores = penalised(logits.float(), seen, rows.penalty)
    likeliest = scores.argmax(-1)
    if not variant.draws:
        return likeliest
    drawn = draw(filtered(scores.float(), rows, variant), uniform(rows.seed, index))
    return torch.where(rows.temperature == 0, likeliest, drawn)


def penalised(
    scores: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], penalty: Float32[Tensor, "b"]
) -> Float[Tensor, "b v"]:
    """Scores with seen tokens made less likely (Keskar et al. 2019, arXiv:1909.05858, 4.1)."""
    factor = penalty[:, None]
    lowered = torch.where(scores < 0, scores * factor, scores / factor)
    return torch.where(seen, lowered, scores)


def filtered(
    scores: Float[Tensor, "b v"], rows: RowSampling, variant: Variant
) -> Float[Tensor, "b v"]:
    """Scores after temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751) and min-p.

    Excluded tokens have score -inf. Tokens that tie with the k-th are kept. If tokens tie at the
    edge of top-p, the order of torch.sort decides, as in transformers. Min-p removes the tokens
    whose probability is below a share of the likeliest token's (Nguyen et al. 2024,
    arXiv:2407.01082).
    """
    if variant.cold:  # then the largest quotient must be 0
        cold = (rows.temperature < _LOW_TEMPERATURE)[:, None]
        scores = scores - torch.where(cold, scores.amax(-1, keepdim=True), 0.0)
    scores = scores / rows.temperature.clamp(min=_LEAST_TEMPERATURE)[:, None]
    if variant.top_k:
        likeliest = scores.topk(variant.top_k, dim=-1).values
        # A greedy row, or one that has ended, may have a larger top_k than the variant.
        kth = likeliest.gather(-1, (rows.top_k - 1).clamp(0, variant.top_k - 1)[:, None])
        scores = scores.masked_fill((scores < kth) & (rows.top_k > 0)[:, None], -math.inf)
    if variant.top_p:
        # From the least likely token: remove it if it and all before it stay below 1 - top_p.
        ordered, index = scores.sort(dim=-1)
        beyond = ordered.softmax(-1).cumsum(-1) <= rows.rest[:, None]
        beyond[:, -1] = False  # the likeliest token is kept
        cut = torch.zeros_like(beyond).scatter(-1, index, beyond)
        scores = scores.masked_fill(cut, -math.inf)
    if variant.min_p:
        p = scores.softmax(-1)
        least = rows.min_p[:, None] * p.amax(-1, keepdim=True)
        scores = scores.masked_fill(p < least, -math.inf)
    return scores


def uniform(seed: Int[Tensor, "b"], index: Int[Tensor, "b"]) -> Float64[Tensor, "b"]:
    """Random numbers in [0, 1) with 53 random bits: hashes of a row's seed and a number.

    There is no generator state, so a row draws the same numbers in any batch and in any order.
    """
    words = torch.stack((2 * index, 2 * index + 1))  # one call, because its cost is the launches
    high, low = fold(seed, words).unbind()
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


def draw(scores: Float[Tensor, "b v"], u: Float64[Tensor, "b"]) -> Int[Tensor, "b"]:
    """For each row the first token at which the probabilities of softmax(scores) add up to > u."""
    p = scores.softmax(-1)
    # In float64 the sums of 128,256 probabilities are exact to 1e-12.
    total = p.cumsum(-1, dtype=torch.float64)
    target = (u * total[:, -1])[:, None]
    # NaN scores give an index behind the last token.
    token = torch.searchsorted(total, target, right=True).clamp(max=scores.shape[-1] - 1)
    # Parallel sums may round up at a token of probability 0. Then take the likeliest one.
    possible = p.gather(-1, token) > 0
    return torch.where(possible, token, p.argmax(-1, keepdim=True))[:, 0]


def likeliest_tokens(logits: Float[Tensor, "b v"], k: int) -> Float64[Tensor, "2 k b"]:
    """Ids and log-probabilities of the k likeliest tokens, under the model's own logits."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values, ids = wide.topk(k, dim=-1)
    return torch.stack((ids.double(), (values - wide.logsumexp(-1, keepdim=True)).double())).mT
