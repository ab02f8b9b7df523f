"""add_tokens(): a vocabulary with new tokens, whose rows start at the mean of the others."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.errors import raise_problems
from fastlora.models.names import EDGE_WEIGHTS
from fastlora.models.params import Base
from fastlora.models.state import StateT
from fastlora.text.tokenizer import Tokenizer


def add_tokens(
    model: StateT, tokenizer: Tokenizer, tokens: Iterable[str], *, special: bool = False
) -> tuple[StateT, Tokenizer, list[int]]:
    """(model, tokenizer, ids of the new tokens); the given ones are unchanged.

        model, tokenizer, ids = fastlora.add_tokens(model, tokenizer, ["<think>", "</think>"])
        model = fastlora.lora(model, trainable_token_indices=ids)

    Their rows, in the embedding and in a head of its own, are the mean of the rows of the tokens
    there were: a new token is then nobody's neighbour, and the loss starts where it was (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models"). `ids` trains the
    embedding, and a tied head; {"embed_tokens": ids, "lm_head": ids} the rows of a head of its own
    as well. The matrices grow to the last new id; a checkpoint with rows to spare (Qwen) has room
    for it already. `save_pretrained` of an adapter over the new model writes both matrices, as PEFT
    does; save the tokenizer to the same folder.

    Args:
        model: without an adapter.
        tokenizer: the model's.
        tokens: texts that are found before any other token.
        special: left out by `decode`, as an end-of-text token is.

    Raises:
        ValueError: listing every token that is no text, twice there or in the vocabulary already;
            or if the model has an adapter, whose shapes are of the old vocabulary.
    """
    problems, new = [], []
    if not isinstance(tokenizer, Tokenizer):
        problems.append(f"tokenizer={tokenizer!r:.80}: expected the model's, of fastlora.load.")
    if model.adapter is not None:
        problems.append("the model carries an adapter; add tokens first, then call fastlora.lora.")
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        problems.append(f"tokens={tokens!r}: expected a list of texts.")
    elif not problems:
        new = list(tokens)
        problems += _token_problems(tokenizer, new)
    raise_problems(ValueError, "fastlora.add_tokens cannot do this:", problems)

    grown = tokenizer.with_tokens(new, special=special)
    ids = [cast(int, grown.backend.token_to_id(token)) for token in new]
    present = [key for key in EDGE_WEIGHTS if key in model.base]
    matrices = {key: _with_mean_rows(model.base[key], ids) for key in present}
    base = cast(Base, {**model.base, **matrices})
    v = base["embed_tokens"].shape[0]
    changed = dict.fromkeys((*model.spec.changed, *(EDGE_WEIGHTS[key] for key in present)))
    config = replace(model.spec.config, vocab_size=v)
    spec = replace(model.spec, config=config, changed=tuple(changed))
    return replace(model, spec=spec, base=base), grown, ids


def _token_problems(tokenizer: Tokenizer, tokens: list[Any]) -> list[str]:
    problems = [] if tokens else ["tokens is empty: expected at least one text."]
    problems += [f"{t!r}: expected a text of at least one character." for t in tokens if not _is(t)]
    texts = [t for t in tokens if _is(t)]
    problems += [f"{t!r} is there twice." for t in sorted({t for t in texts if texts.count(t) > 1})]
    known = [t for t in dict.fromkeys(texts) if tokenizer.backend.token_to_id(t) is not None]
    return problems + [
        f"{t!r} is in the vocabulary already, as {tokenizer.backend.token_to_id(t)}." for t in known
    ]


def _is(token: Any) -> bool:
    return isinstance(token, str) and token != ""


def _with_mean_rows(matrix: Float[Tensor, "v d"], ids: list[int]) -> Float[Tensor, "_ d"]:
    """The matrix with rows for new ids, all the mean of the rows below them, in its dtype."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    mean = matrix[: min(ids)].mean(0, dtype=wide).to(matrix.dtype)
    missing = max(ids) + 1 - matrix.shape[0]
    grown = torch.cat([matrix, mean.expand(max(missing, 0), -1)])
    grown[min(ids) : max(ids) + 1] = mean
    return grown
