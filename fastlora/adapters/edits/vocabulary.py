"""add_tokens(): adds tokens to a vocabulary; their rows start at the mean of the other rows."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.arguments import ENCODABLE_TEXT, FLAG, argument_problems, describe, iterable
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL
from fastlora.models.names import EDGE_WEIGHTS
from fastlora.models.params import Base
from fastlora.models.state import StateT
from fastlora.ops.dispatch import refuse_transforms
from fastlora.runtime.layer_fetching import resident, with_edges_of
from fastlora.text.tokenizer import TOKENIZER, Tokenizer


def add_tokens(
    model: StateT, tokenizer: Tokenizer, tokens: Iterable[str], *, special: bool = False
) -> tuple[StateT, Tokenizer, list[int]]:
    """Return (model, tokenizer, ids of the new tokens); the given ones are unchanged.

        model, tokenizer, ids = fastlora.add_tokens(model, tokenizer, ["<think>", "</think>"])
        model = fastlora.lora(model, trainable_token_indices=ids)

        base {"embed_tokens": E [v, d], "lm_head": H [v, d], ...}
    ->  base {"embed_tokens": [E; means] [v + 2, d], "lm_head": [H; means] [v + 2, d], ...}

    The new rows, of the embedding and of an untied head, are the mean of the rows before them. Such
    a token is not close to any other token, and the loss starts where it was (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"). `ids` trains the embedding
    and a tied head; {"embed_tokens": ids, "lm_head": ids} trains the rows of an untied head too. If
    a checkpoint has more rows than tokens (Qwen), these rows are used first. `save_pretrained` of
    an adapter over the new model writes both matrices, as PEFT does. Save the tokenizer to the same
    folder.

    Args:
        model: without an adapter.
        tokenizer: the model's.
        tokens: texts that are matched before any other token.
        special: `decode` leaves these tokens out, as it does an end-of-text token.

    Raises:
        ValueError: listing every token that is not a text, occurs twice or is already in the
            vocabulary; or the model has an adapter, whose shapes depend on the old vocabulary.
    """
    refuse_transforms("fastlora.add_tokens")
    problems = argument_problems(
        {
            "model": (model, MODEL),
            "tokenizer": (tokenizer, TOKENIZER),
            "tokens": (tokens, iterable("a list of texts")),
            "special": (special, FLAG),
        }
    )
    new = []
    # The checks of each token read the tokenizer and iterate over `tokens`.
    if not problems:
        new = list(tokens)
        problems = _token_problems(tokenizer, new)
        if model.adapter is not None:
            problems.append("model has an adapter; add tokens first, then call fastlora.lora")
    raise_problems(ValueError, "fastlora.add_tokens cannot do this:", problems)

    new_tokenizer = tokenizer.with_tokens(new, special=special)
    ids = [cast(int, new_tokenizer.backend.token_to_id(token)) for token in new]
    matrices = {
        k: _with_mean_rows(resident(model.base[k]), ids) for k in EDGE_WEIGHTS if k in model.base
    }
    base = cast(Base, with_edges_of({**model.base, **matrices}, model.base))
    # The checkpoint does not have these rows, so an adapter alone would not load over it.
    # save_pretrained therefore writes the changed matrices beside the adapter.
    changed = dict.fromkeys((*model.spec.changed, *(EDGE_WEIGHTS[key] for key in matrices)))
    config = replace(model.spec.config, vocab_size=matrices["embed_tokens"].shape[0])
    spec = replace(model.spec, config=config, changed=tuple(changed))
    return replace(model, spec=spec, base=base), new_tokenizer, ids


def _token_problems(tokenizer: Tokenizer, tokens: list[Any]) -> list[str]:
    """Problems with the new tokens; each line begins with "tokens"."""
    if not tokens:
        return ["tokens is empty: expected at least one text"]
    problems = [
        f"tokens holds {describe(t)}: expected a text of at least one character"
        for t in tokens
        if not _is_token(t)
    ]
    texts = [t for t in tokens if _is_token(t)]
    problems += [
        f"tokens holds {t!r} twice" for t in sorted({t for t in texts if texts.count(t) > 1})
    ]
    return problems + [
        f"tokens holds {t!r}, which is already in the vocabulary, with id {known}"
        for t in dict.fromkeys(texts)
        if (known := tokenizer.backend.token_to_id(t)) is not None
    ]


def _is_token(value: Any) -> bool:
    return ENCODABLE_TEXT.accepts(value) and value != ""


def _with_mean_rows(matrix: Float[Tensor, "v d"], ids: list[int]) -> Float[Tensor, "_ d"]:
    """The matrix with rows for new ids, all equal to the mean of the rows below the first id.

    The mean is computed in at least float32 and rounded to the matrix's dtype.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    mean = matrix[: min(ids)].mean(0, dtype=wide).to(matrix.dtype)
    # 0 or less if the matrix already has rows for these ids (Qwen2.5 has 271 spare ones).
    missing = max(ids) + 1 - matrix.shape[0]
    extended = torch.cat([matrix, mean.expand(max(missing, 0), -1)])
    extended[min(ids) : max(ids) + 1] = mean
    return extended
