"""Generate for one batch of prompts: prefill once, then one token at a time for all rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from fastlora.arguments import (
    FUNCTION,
    Rule,
    argument_problems,
    int_list,
    optional,
    setting_problems,
    whole_number,
)
from fastlora.errors import raise_problems
from fastlora.generation.forward import decode, new_cache, prefill, prepare
from fastlora.generation.sampling import SEED, Sampling, choose, new_generator, seen_ids
from fastlora.models.names import tensors_from_base
from fastlora.models.params import first_nonfinite
from fastlora.models.state import ModelState


def _stop_ids_rule(vocab_size: int) -> Rule:
    def accepts(x: Any) -> bool:
        ids = [x] if type(x) is int else int_list(x) if hasattr(x, "__len__") else None
        is_id = lambda i: type(i) is int and 0 <= i < vocab_size
        return type(ids) is list and all(map(is_id, ids))

    return Rule(accepts, f"a token id in [0, {vocab_size}) or a list of them")


def check_generation(
    model: ModelState,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    max_new_tokens: Any,
    sampling: Sampling,
    eos_token_id: Any,
    seed: Any,
    stream: Any,
) -> None:
    """Check what `generate` takes beyond tensors, which `check_inputs` has checked before.

    Raises:
        ValueError: a setting of a wrong type or value, a text that becomes too long, or a row that
            ends in padding. Lists all problems.
    """
    rules = {
        "max_new_tokens": (max_new_tokens, whole_number(1)),
        "eos_token_id": (eos_token_id, optional(_stop_ids_rule(model.spec.config.vocab_size))),
        "seed": (seed, optional(SEED)),
        "stream": (stream, optional(FUNCTION)),
    }
    problems = setting_problems(sampling) + argument_problems(rules)
    t, longest = input_ids.shape[1], model.spec.max_seq_length
    if isinstance(max_new_tokens, int) and max_new_tokens > 0 and t + max_new_tokens > longest:
        problems.append(
            f"max_new_tokens={max_new_tokens}: {t} prompt tokens and {max_new_tokens} new ones "
            f"make {t + max_new_tokens}; max_seq_length is {longest}. Shorten the prompt, or load "
            "with a larger max_seq_length"
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        problems.append(
            "attention_mask: a row ends in padding; expected padding on the left, so that all "
            "prompts end in the last column"
        )
    raise_problems(ValueError, "Model.generate cannot do this:", problems)


def stop_ids(eos_token_id: int | Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """The argument `eos_token_id` as a tuple; None is the default."""
    if eos_token_id is None:
        return tuple(default)
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(int_list(eos_token_id))


@torch.no_grad()
def generate(
    model: ModelState,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    seed: int | None,
    stream: Callable[[Int[Tensor, "b"]], Any] | None,
) -> Int[Tensor, "b t_new"]:
    """Prompt and continuation, int64. Ends when every row has stopped, or after `max_new_tokens`.

    A row that has stopped is filled with the config's pad_token_id, or else the first stop id. An
    id outside the vocabulary is passed over, because a stopped row still goes through the model.

    Args:
        model: with or without an adapter.
        input_ids: prompts, padded on the left.
        attention_mask: 1 = real token; None means all are.
        max_new_tokens: tokens to add at most.
        sampling: how to choose tokens.
        stop: ids that stop a row. The stop id is part of the result.
        seed: of the private generator that samples; None draws fresh entropy.
        stream: called after every step with the new token of each row.

    Raises:
        FloatingPointError: no finite score for the next token of a row that has not stopped.
    """
    prepared = prepare(model)
    config, (b, t) = prepared.spec.config, input_ids.shape
    device = input_ids.device
    generator = new_generator(seed, device)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    penalises = sampling.repetition_penalty != 1.0
    seen = seen_ids(input_ids, real, config.vocab_size) if penalises else None
    stop_tensor = torch.tensor(stop, dtype=torch.int64, device=device)
    # A stopped row stays in the batch until all rows have stopped; `fill` replaces its tokens.
    fillers = (config.pad_token_id, *stop)
    fill = next((i for i in fillers if i is not None and 0 <= i < config.vocab_size), 0)
    cache = new_cache(prepared, b, t + max_new_tokens)
    scores = prefill(prepared, input_ids, attention_mask, cache)
    ids, position = input_ids, real.sum(-1, keepdim=True)
    running = torch.ones(b, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        _check_finite(scores, running, step, model)
        token = torch.where(running, choose(scores, seen, sampling, generator), fill)
        ids = torch.cat((ids, token[:, None]), dim=1)
        if stream is not None:
            stream(token)
        running = running & ~torch.isin(token, stop_tensor)
        if step == max_new_tokens - 1 or not running.any():
            break
        seen = None if seen is None else seen.scatter(1, token[:, None], True)
        real = F.pad(real, (0, 1), value=1)
        scores = decode(prepared, token[:, None], position, real.bool(), cache)
        position = position + 1
    return ids


def _check_finite(
    scores: Float[Tensor, "b v"], running: Bool[Tensor, "b"], step: int, model: ModelState
) -> None:
    """Raise FloatingPointError if the likeliest token of a running row has no finite score."""
    best = scores.amax(-1)  # NaN if any score of the row is
    wrong = running & ~best.isfinite()
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0, 0])
    raise FloatingPointError(
        f"Model.generate: after {step} new tokens the largest logit of row {row} is "
        f"{float(best[row])}. {_first_non_finite(model)}"
    )


def _first_non_finite(model: ModelState) -> str:
    base = tensors_from_base(model.spec.config, model.base)
    paths = tree_flatten_with_path(model.adapter)[0]
    adapter = {"".join(map(str, path)): leaf for path, leaf in paths}
    for owner, tensors in (("base", base), ("adapter", adapter)):
        if (name := first_nonfinite(tensors)) is not None:
            return f"The {owner}'s tensor {name} holds NaN or infinity; load it again."
    dtype = str(model.base["norm"].dtype).removeprefix("torch.")
    return f"All weights are finite: an activation overflows {dtype}. Load in a wider dtype."
