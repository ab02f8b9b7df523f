"""Generation: prefill once, then one token at a time against a key-value cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.llama.decoder import layer_adapters, product_dtype, where
from fastlora.llama.embedding import embed, embedding_gain
from fastlora.llama.head import Head, head, logits
from fastlora.llama.layer import attention_output, layer_spec, mlp_block, queries_keys_values
from fastlora.llama.params import Adapter, Base, with_replaced
from fastlora.llama.positions import rope_tables
from fastlora.llama.spec import Spec
from fastlora.llama.start import joined, without_start
from fastlora.ops.attention import attention
from fastlora.ops.rms_norm import rms_norm


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


class Ends(NamedTuple):
    """What comes before and after the layers, made once and not at every token."""

    gain: Float[Tensor, "d"] | None  # DoRA's, of the embedding
    head: Head


class Cache(NamedTuple):
    """Keys and values of every layer, allocated once for prompt and new tokens together."""

    k: tuple[Float[Tensor, "b kv s hd"], ...]
    v: tuple[Float[Tensor, "b kv s hd"], ...]


def new_cache(base: Base, spec: Spec, b: int, length: int) -> Cache:
    """Room for `length` positions: 2 * b * layers * kv * length * hd elements, in base dtype."""
    config, like = spec.config, base["norm"]
    shape = (b, config.num_key_value_heads, length, config.head_dim)
    new = lambda: tuple(like.new_empty(shape) for _ in range(config.num_hidden_layers))
    return Cache(k=new(), v=new())


def prefill(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    cache: Cache,
    ends: Ends,
) -> Float[Tensor, "b v"]:
    """Logits after the whole prompt; writes the prompt's keys and values into the cache."""
    config, t = spec.config, input_ids.shape[1]
    x = embed(input_ids, adapter, base, spec, ends.gain)
    at = where(config, input_ids, x.dtype, attention_mask, None, None)
    adapters = layer_adapters(adapter, config)
    for i, params in enumerate(base["layers"]):
        static = layer_spec(spec, i)
        q, k, v = queries_keys_values(x, params, adapters[i], at.cos, at.sin, static, None)
        cache.k[i][:, :, :t] = k
        cache.v[i][:, :, :t] = v
        heads = attention(q, k, v, at.masks[config.layer_types[i]])
        x = x + attention_output(heads, params, adapters[i], static, None)
        x = mlp_block(x, params, adapters[i], static, None)
    return _last_logits(x, base, spec, ends)


def decode(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    token: Int[Tensor, "b 1"],
    position_ids: Int[Tensor, "b 1"],
    real: Bool[Tensor, "b s"],
    cache: Cache,
    ends: Ends,
) -> Float[Tensor, "b v"]:
    """Logits after one more token, the s-th; `real` is False where a cached one is padding."""
    config, s = spec.config, real.shape[1]
    x = embed(token, adapter, base, spec, ends.gain)
    cos, sin = rope_tables(config, position_ids, position_ids + 1, x.dtype)
    near = torch.arange(s, device=real.device) > s - 1 - (config.sliding_window or s)
    masks = {
        "full_attention": real[:, None, None],
        "sliding_attention": (real & near)[:, None, None],
    }
    adapters = layer_adapters(adapter, config)
    for i, params in enumerate(base["layers"]):
        static = layer_spec(spec, i)
        q, k, v = queries_keys_values(x, params, adapters[i], cos, sin, static, None)
        cache.k[i][:, :, s - 1 : s] = k
        cache.v[i][:, :, s - 1 : s] = v
        mask = masks[config.layer_types[i]]
        heads = attention(q, cache.k[i][:, :, :s], cache.v[i][:, :, :s], mask)
        x = x + attention_output(heads, params, adapters[i], static, None)
        x = mlp_block(x, params, adapters[i], static, None)
    return _last_logits(x, base, spec, ends)


def _last_logits(
    x: Float[Tensor, "b t d"], base: Base, spec: Spec, ends: Ends
) -> Float[Tensor, "b v"]:
    hidden = rms_norm(x[:, -1], base["norm"], spec.config.rms_norm_eps)
    return logits(hidden, hidden, ends.head, spec)


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


@torch.no_grad()
def generate(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_token_id: Sequence[int] = (),
    seed: int | None = None,
    stream: Callable[[Int[Tensor, "b"]], None] | None = None,
) -> Int[Tensor, "b t_new"]:
    """Prompt and continuation, int64; ends when every row has stopped.

    A row that has stopped is filled with the config's pad_token_id, or the first stop id.

    Args:
        adapter: what LoRA trained; None is the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: prompts, padded on the left.
        attention_mask: 1 = real token; None means all are.
        max_new_tokens: tokens to add at most.
        sampling: default greedy.
        eos_token_id: ids that stop a row; the stop id itself is part of the result.
        seed: of the private generator that samples; None draws fresh entropy.
        stream: called after every step with the new token of each row.
    """
    sampling = sampling or Sampling()
    b, t = input_ids.shape
    generator = torch.Generator(input_ids.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    stops = torch.tensor(eos_token_id, dtype=torch.int64, device=input_ids.device)
    pad = spec.config.pad_token_id
    fill = pad if pad is not None else (eos_token_id[0] if eos_token_id else 0)
    if adapter is not None:  # once, not at every token
        dtype = base["norm"].dtype
        adapter, base = joined(adapter, base), without_start(base)
        base = with_replaced(base, adapter, tied=spec.outside.tied)
        layers = tuple(product_dtype(x, spec, dtype) for x in adapter["layers"])
        adapter = Adapter(**adapter | {"layers": layers})
    ends = Ends(embedding_gain(adapter, base, spec), head(adapter, base, spec))
    cache = new_cache(base, spec, b, t + max_new_tokens)
    scores = prefill(adapter, base, spec, input_ids, attention_mask, cache, ends)
    seen = _seen(input_ids, real, spec) if sampling.repetition_penalty != 1.0 else None
    ids, position = input_ids, real.sum(-1, keepdim=True)
    running = torch.ones(b, dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        token = torch.where(running, choose(scores, seen, sampling, generator), fill)
        ids = torch.cat((ids, token[:, None]), dim=1)
        if stream is not None:
            stream(token)
        running = running & ~torch.isin(token, stops)
        if step == max_new_tokens - 1 or not running.any():
            break
        seen = None if seen is None else seen.scatter(1, token[:, None], True)
        real = F.pad(real, (0, 1), value=1)
        scores = decode(adapter, base, spec, token[:, None], position, real.bool(), cache, ends)
        position = position + 1
    return ids


def _seen(input_ids: Tensor, real: Tensor, spec: Spec) -> Bool[Tensor, "b v"]:
    """Which ids a row's real tokens hold; padding is not part of a text."""
    counts = torch.zeros(
        input_ids.shape[0], spec.config.vocab_size, dtype=torch.int64, device=input_ids.device
    )
    return counts.scatter_add(1, input_ids, real.long()) > 0


class TextStream:
    """Turns streamed ids into streamed text; holds back bytes that are no whole character yet."""

    def __init__(self, decode: Callable[[list[int]], str], emit: Callable[[str], None] | None):
        """`decode` maps ids to text; `emit` takes each new piece, None takes nothing."""
        self.decode, self.emit = decode, emit
        self.ids: list[int] = []
        self.sent = 0  # characters already emitted

    def __call__(self, token: Int[Tensor, "1"]) -> None:
        """Take the next id."""
        if self.emit is None:
            return
        self.ids.append(int(token))
        text = self.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._send(text)

    def finish(self) -> None:
        """Emit what was held back."""
        if self.emit is not None:
            self._send(self.decode(self.ids))

    def _send(self, text: str) -> None:
        if self.emit is not None and len(text) > self.sent:
            self.emit(text[self.sent :])
            self.sent = len(text)
