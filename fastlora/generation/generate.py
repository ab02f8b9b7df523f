"""Generation: prefill once, then one token at a time against a key-value cache."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from fastlora.errors import raise_problems
from fastlora.generation import sampling as sampling_rules
from fastlora.generation.forward import EmbeddingAndHead, decode, new_cache, prefill
from fastlora.generation.sampling import Sampling, choose
from fastlora.models.decoder import product_dtype
from fastlora.models.embedding import embedding_gain
from fastlora.models.head import head
from fastlora.models.names import with_replaced
from fastlora.models.params import Adapter
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Spec
from fastlora.models.state import ModelState


def check_generation(
    model: ModelState,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    sampling: sampling_rules.Sampling,
) -> None:
    problems = sampling.problems()
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        problems.append(f"max_new_tokens must be a whole number >= 1, got {max_new_tokens!r}")
    elif (total := input_ids.shape[1] + max_new_tokens) > model.spec.max_seq_length:
        problems.append(
            f"{input_ids.shape[1]} prompt tokens and max_new_tokens={max_new_tokens} make {total}; "
            f"max_seq_length is {model.spec.max_seq_length}"
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        problems.append("a row ends in padding; pad prompts on the left, so that all end together")
    raise_problems(ValueError, "cannot generate:", problems)


@torch.no_grad()
def generate(
    model: ModelState,
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
        model: with or without an adapter.
        input_ids: prompts, padded on the left.
        attention_mask: 1 = real token; None means all are.
        max_new_tokens: tokens to add at most.
        sampling: default greedy.
        eos_token_id: ids that stop a row; the stop id itself is part of the result.
        seed: of the private generator that samples; None draws fresh entropy.
        stream: called after every step with the new token of each row.
    """
    sampling = sampling or Sampling()
    model = self_contained(model, unpark=model.adapter is None)
    adapter, base, spec = model.adapter, model.base, model.spec
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
        base = with_replaced(base, adapter, tied=spec.extras.tied)
        layers = tuple(product_dtype(x, spec, dtype) for x in adapter["layers"])
        adapter = Adapter(**adapter | {"layers": layers})
    ends = EmbeddingAndHead(embedding_gain(adapter, base, spec), head(adapter, base, spec))
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
